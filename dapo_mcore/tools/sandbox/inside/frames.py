"""Messages between the trainer and the processes of tools: the length in four bytes, then JSON. Never pickle.

Change here: the format. Standard library only: it is read inside the sandbox, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
from typing import Any

LONGEST = 256 << 20
"""Bytes of the longest message. A longer one means that the other side is broken."""
_HEADER = struct.Struct("!I")


def encode(message: Any) -> bytes:
    """Return the message as bytes."""
    body = json.dumps(message).encode()
    return _HEADER.pack(len(body)) + body


def send(fd: int, message: Any) -> None:
    """Write the message to a pipe."""
    rest = memoryview(encode(message))
    while rest:
        rest = rest[os.write(fd, rest) :]


def receive(fd: int) -> Any:
    """Return the next message of a pipe. Raise EOFError at its end."""
    return json.loads(_read(fd, _length(_read(fd, _HEADER.size))))


async def receive_from(stream: asyncio.StreamReader) -> Any:
    """Return the next message of a stream. Raise EOFError at its end."""
    return json.loads(await stream.readexactly(_length(await stream.readexactly(_HEADER.size))))


def _length(header: bytes) -> int:
    (length,) = _HEADER.unpack(header)
    if length > LONGEST:
        raise EOFError(f"a message of {length} bytes is longer than {LONGEST}: the stream is damaged")
    return length


def _read(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError("the other side has closed the pipe")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
