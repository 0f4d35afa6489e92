"""What each version of SGLang can do. Only this file knows; the tests take their expectations from it, too.

Change here: when a newer SGLang can do something that the engine uses. tests/rollout/sglang/client/test_server_rules.py
and tests/rollout/sglang/sync/test_transfer_rules.py check servers of any version against this file.
"""

from __future__ import annotations

import re

from dapo_mcore.errors import ConfigError

SGLangVersion = tuple[int, ...]
"""Example: (0, 5, 21)."""

OLDEST: SGLangVersion = (0, 5, 15)
FIRST_WITH_STOP_AT_LIMIT: SGLangVersion = (0, 5, 18)
"""A stop token at the length limit counts as `stop`. Older versions report `length` (see reply.py)."""
FIRST_WITH_LOST_SCALES: SGLangVersion = (0, 5, 18)
"""Releasing memory also loses the scales of an FP8 KV cache. They come back as zeros, and loading FP8 weights from disk
then treats zeros as 1.0. An older server ends, unless the weights bring the scales (see weight_format.py)."""
FIRST_WITH_SPANS: SGLangVersion = (0, 5, 19)
"""An answer names the weights of each of its tokens (`weight_versions`)."""
FIRST_WITH_SESSIONS: SGLangVersion = (0, 5, 21)
"""Weights are sent between begin_weight_update and end_weight_update. Older versions have neither call, and end if they
are told to receive from a group that they have not joined."""
FIRST_WITH_CONTINUED_REQUESTS: SGLangVersion = (0, 5, 21)
"""The KV cache can be flushed while requests wait retracted, so they can continue under new weights. Older versions
refuse to flush, and end at a weight update that flushes."""
FIRST_WITH_CHECKSUMS_ON_CPUS: SGLangVersion = (0, 5, 23)
"""A server without a CUDA device reports checksums of its weights, too."""


def parse_version(text: str) -> SGLangVersion:
    """Return (0, 5, 21) for `0.5.21`, `0.5.21.post1` or `0.5.21rc2`. Raise ValueError for other texts."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    if not found:
        raise ValueError(f"{text!r} is not a version")
    return tuple(int(part) for part in found.groups())


def check_version(version: SGLangVersion, where: str, continues_requests: bool = False) -> None:
    """Raise ConfigError if the version is too old.

    where               the server or interpreter that has it, for the message.
    continues_requests  requests in flight must continue after a weight update.
    """
    if version < OLDEST:
        raise ConfigError(
            f"{where} has SGLang {_dotted(version)}, but weight updates need at least {_dotted(OLDEST)}; install a newer one"
        )
    if continues_requests and version < FIRST_WITH_CONTINUED_REQUESTS:
        raise ConfigError(
            f"{where} has SGLang {_dotted(version)}, where no request lives through a weight update; sampling.on_full keep "
            f"needs {_dotted(FIRST_WITH_CONTINUED_REQUESTS)} or newer: update SGLang, or set on_full wait"
        )


def _dotted(version: SGLangVersion) -> str:
    return ".".join(map(str, version))
