"""Who a prompt is: what the actor and the reward see of it, never where it stands in a file.

Change here: what makes two prompts the same. Work that outlives a process (carried groups, prompts to ask again, the
place in an epoch) is stored under these names, so that it cannot meet another prompt when files or templates change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np

from dapo_mcore.types import Prompt


def prompt_uid(prompt: Prompt) -> str:
    """24 hexadecimal digits that follow from all of the prompt but its uid and row: equal exactly where all is equal."""
    fields = [prompt.text, prompt.answer, prompt.source, prompt.extra, prompt.messages]
    columns = json.dumps(fields, sort_keys=True, default=str).encode()
    digest = hashlib.blake2b(len(columns).to_bytes(8, "little") + columns, digest_size=12)
    digest.update(np.ascontiguousarray(prompt.token_ids, dtype="<i4").tobytes())
    return digest.hexdigest()


def numbered(uid: str, number: int) -> str:
    """The uid of the prompt that is the `number`-th of equal content, counted from 1: `3f…`, then `3f…#2`."""
    return uid if number == 1 else f"{uid}#{number}"


def fingerprint(uids: Iterable[str]) -> str:
    """16 hexadecimal digits that follow from the prompts' contents and their order."""
    return hashlib.blake2b("\n".join(uids).encode(), digest_size=8).hexdigest()
