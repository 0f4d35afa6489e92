"""The identity of a prompt: what the actor and the reward function see of it, not its position in a file.

Change here: when two prompts are the same. Checkpoints refer to prompts by these uids (carried groups, prompts to generate
again, the position in an epoch), so that changed files or templates cannot lead to another prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np

from dapo_mcore.types import Prompt


def prompt_uid(prompt: Prompt) -> str:
    """Return 24 hexadecimal digits, a hash of all fields of the prompt except uid and row."""
    fields = [prompt.text, prompt.answer, prompt.source, prompt.extra, prompt.messages]
    columns = json.dumps(fields, sort_keys=True, default=str).encode()
    digest = hashlib.blake2b(len(columns).to_bytes(8, "little") + columns, digest_size=12)
    digest.update(np.ascontiguousarray(prompt.token_ids, dtype="<i4").tobytes())
    return digest.hexdigest()


def numbered(uid: str, number: int) -> str:
    """Return the uid of the `number`-th prompt of equal content, counted from 1: `3f…`, then `3f…#2`."""
    return uid if number == 1 else f"{uid}#{number}"


def fingerprint(uids: Iterable[str]) -> str:
    """Return 16 hexadecimal digits, a hash of the prompts' contents and their order."""
    return hashlib.blake2b("\n".join(uids).encode(), digest_size=8).hexdigest()
