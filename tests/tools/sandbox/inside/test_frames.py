"""Messages over pipes: whole ones, their end, and damaged ones."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from dapo_mcore.tools.sandbox.inside import frames


def test_messages_come_out_as_they_went_in_and_then_the_pipe_ends():
    reader, writer = os.pipe()
    messages = [{"text": "naïve 🙂 \x00"}, None, ["x" * 300_000]]

    def write() -> None:
        for message in messages:
            frames.send(writer, message)
        os.close(writer)

    threading.Thread(target=write).start()
    assert [frames.receive(reader) for _ in messages] == messages
    with pytest.raises(EOFError):
        frames.receive(reader)
    os.close(reader)


@pytest.mark.parametrize("damaged", [b"\x00\x00", b"\x00\x00\x00\x09[1", b"\xff\xff\xff\xff"])
def test_a_cut_or_damaged_message_is_an_end(damaged: bytes):
    reader, writer = os.pipe()
    os.write(writer, damaged)
    os.close(writer)
    with pytest.raises(EOFError):
        frames.receive(reader)
    os.close(reader)

    async def from_stream() -> None:
        stream = asyncio.StreamReader()
        stream.feed_data(damaged)
        stream.feed_eof()
        await frames.receive_from(stream)

    with pytest.raises(EOFError):
        asyncio.run(from_stream())


def test_a_stream_gives_the_same_message():
    async def from_stream() -> object:
        stream = asyncio.StreamReader()
        stream.feed_data(frames.encode({"a": [1]}))
        return await frames.receive_from(stream)

    assert asyncio.run(from_stream()) == {"a": [1]}
