"""What a version of SGLang can do: the one place where the code knows, and from which the tests take what to expect.

Change here: when a newer SGLang can do something that the engine relies on. tests/rollout/sglang/client/test_server_rules.py and
test_transfer_rules.py hold servers of any version to what stands here.
"""

from __future__ import annotations

import re

from dapo_mcore.errors import ConfigError

Version = tuple[int, ...]
"""(0, 5, 21)."""

OLDEST: Version = (0, 5, 15)
FIRST_WITH_STOP_AT_LIMIT: Version = (0, 5, 18)
"""A stop token counts as `stop` also where it is the last token allowed; before, as `length` (replies.py)."""
FIRST_WITH_LOST_SCALES: Version = (0, 5, 18)
"""Released memory holds the scales of the KV cache, too, and comes back as zeros, which are taken as 1.0 where FP8 weights
are loaded from disk. Before, this ends the server, unless the weights bring the scales (quantize.py)."""
FIRST_WITH_SPANS: Version = (0, 5, 19)
"""An answer tells which weights made which of its tokens."""
FIRST_WITH_SESSIONS: Version = (0, 5, 21)
"""Weights that are sent come between begin_weight_update and end_weight_update alone; before, neither call is there, and
a broadcast to a group that it has not joined ends the server."""
FIRST_WITH_RESUMPTION: Version = (0, 5, 21)
"""The KV cache can be flushed while requests wait retracted, so that they go on under new weights. Before, asking for it
is refused, and a weight update that flushes ends the server."""
FIRST_WITH_CHECKSUMS_ON_CPUS: Version = (0, 5, 23)
"""A server tells checksums of its weights also where there is no CUDA device (checksums.py)."""


def parse_version(text: str) -> Version:
    """(0, 5, 21) of `0.5.21`, `0.5.21.post1` or `0.5.21rc2`. Raises ValueError."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    if not found:
        raise ValueError(f"{text!r} is not a version")
    return tuple(int(part) for part in found.groups())


def check_version(version: Version, where: str, resumes: bool = False) -> None:
    """Nothing; raises ConfigError for a version that is too old.

    resumes  requests in flight go on after a weight update, under the new weights.
    """
    if version < OLDEST:
        raise ConfigError(
            f"{where} has SGLang {_dotted(version)}, but weight updates need at least {_dotted(OLDEST)}; install a newer one"
        )
    if resumes and version < FIRST_WITH_RESUMPTION:
        raise ConfigError(
            f"{where} has SGLang {_dotted(version)}, where no request lives through a weight update; sampling.on_full keep "
            f"needs {_dotted(FIRST_WITH_RESUMPTION)} or newer: update SGLang, or set on_full wait"
        )


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
