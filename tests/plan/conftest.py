from __future__ import annotations

from tests.actor.conftest import alone  # noqa: F401
