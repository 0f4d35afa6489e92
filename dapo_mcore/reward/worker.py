"""One reward worker: a fresh interpreter that loads the reward function and scores one attempt after another.

Change here: what happens inside a worker. pool.py starts, watches and kills it.
Requests are pickled by the controller; answers are JSON, so that nothing a reward function makes is unpickled there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from dapo_mcore.errors import RewardError
from dapo_mcore.reward.attempt import judged
from dapo_mcore.reward.plugins import build_judge

LATE_EXIT_CODE = 1
"""Of a worker that ended itself over an attempt past its deadline; faulthandler's."""

_GRACE_SECONDS = 5.0


def serve(fd: int, function: str, adapter: str, strict_box: bool, timeout_seconds: float) -> None:
    """Returns when the controller hangs up. Says `ready` or why not, then one outcome an attempt."""
    os.set_inheritable(fd, False)  # a child of the reward function must not keep this pipe open
    connection = Connection(fd)
    try:
        judge = build_judge(function, adapter, strict_box)
    except RewardError as error:
        _send(connection, {"error": str(error)})
        return
    _send(connection, {"ready": True})
    while True:
        try:
            attempt = connection.recv()
        except EOFError:
            return
        # The controller kills a late worker; this ends it where the controller itself is gone, or held up.
        faulthandler.dump_traceback_later(timeout_seconds + _GRACE_SECONDS, exit=True)
        outcome = judged(judge, attempt)
        faulthandler.cancel_dump_traceback_later()
        _send(connection, asdict(outcome))


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    serve(int(sys.argv[1]), **json.loads(sys.argv[2]))
