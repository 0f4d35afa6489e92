"""One reward worker: a new interpreter that loads the reward function and scores one attempt after another.

Change here: what happens inside a worker. pool.py starts, watches and kills it.
The controller pickles requests; answers are JSON, so the controller never unpickles data from a reward function.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from dapo_mcore.errors import RewardError
from dapo_mcore.reward.attempt import judged
from dapo_mcore.reward.plugins import Rule, build_judge

LATE_EXIT_CODE = 1
"""Exit code of a worker that ended itself after an attempt's deadline; set by faulthandler."""

_GRACE_SECONDS = 5.0


def serve(fd: int, rule: Mapping[str, Any], timeout_seconds: float) -> None:
    """Send `ready` or an error, then one outcome per attempt, until the controller closes the pipe."""
    os.set_inheritable(fd, False)  # a child of the reward function must not keep this pipe open
    connection = Connection(fd)
    try:
        judge = build_judge(Rule(**rule))
    except RewardError as error:
        _send(connection, {"error": str(error)})
        return
    _send(connection, {"ready": True})
    while True:
        try:
            attempt = connection.recv()
        except EOFError:
            return
        # The controller kills a late worker. This ends it if the controller is gone or delayed.
        faulthandler.dump_traceback_later(timeout_seconds + _GRACE_SECONDS, exit=True)
        outcome = judged(judge, attempt)
        faulthandler.cancel_dump_traceback_later()
        _send(connection, asdict(outcome))


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    serve(int(sys.argv[1]), **json.loads(sys.argv[2]))
