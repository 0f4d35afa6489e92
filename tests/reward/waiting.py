"""Wait for something to happen in another process."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)
