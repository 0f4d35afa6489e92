"""The HTTP client against a server in the same loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from aiohttp import web

from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.client.http import HttpClient, RequestFailed, allow_open_files

ANSWER = b"[" + b"1," * 1000 + b"1]"


def talk(say: Callable[[HttpClient, str], Awaitable[None]], connect_timeout_s: float = 30.0) -> None:
    """Run `say` with a client and the URL of a server that always gives the same answer."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=ANSWER)

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        client = HttpClient(connect_timeout_s, read_timeout_s=30.0)
        try:
            await say(client, f"http://127.0.0.1:{runner.addresses[0][1]}/")
        finally:
            await client.close()
            await runner.cleanup()

    asyncio.run(run())


def test_answers_that_arrive_together_are_decoded_in_different_turns_of_the_loop():
    turn, decoded_in = 0, []

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    async def say(client: HttpClient, url: str) -> None:
        counting = asyncio.create_task(count_turns())
        decode = lambda raw: decoded_in.append(turn)  # noqa: E731
        await asyncio.gather(*(client.call("GET", url, decode=decode) for _ in range(50)))
        counting.cancel()

    talk(say)
    assert len(decoded_in) == 50 and len(set(decoded_in)) == 50


def test_a_decoder_that_fails_does_not_keep_the_next_answer_waiting():
    async def say(client: HttpClient, url: str) -> None:
        with pytest.raises(ZeroDivisionError):
            await client.call("GET", url, decode=lambda raw: 1 // 0)
        assert len(await client.call("GET", url)) == 1001

    talk(say)


def test_an_answer_one_byte_beyond_its_limit_fails_the_request():
    async def say(client: HttpClient, url: str) -> None:
        assert len(await client.call("GET", url, max_bytes=len(ANSWER))) == 1001
        limit = len(ANSWER) - 1
        with pytest.raises(RequestFailed, match=f"sent more than the {limit} bytes that its whole answer may have"):
            await client.call("GET", url, max_bytes=limit)

    talk(say)


def test_a_server_that_accepts_no_connection_has_an_error_of_its_own():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        url = f"http://127.0.0.1:{full.getsockname()[1]}/"
        waiting = [socket.socket() for _ in range(4)]  # nobody accepts them: the queue is full
        for queued in waiting:
            queued.setblocking(False)
            with suppress(BlockingIOError):
                queued.connect(full.getsockname())

        async def say(client: HttpClient, _: str) -> None:
            with pytest.raises(RequestFailed, match=r"took no connection within 0\.3 s"):
                await client.call("GET", url, timeout_s=20.0)

        talk(say, connect_timeout_s=0.3)
        for queued in waiting:
            queued.close()


def test_the_limit_of_open_files_is_raised_or_explained():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        allow_open_files(400)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 400 + 256
        with pytest.raises(ConfigError, match=f"need {hard + 256} open files, but this process may open {hard}"):
            allow_open_files(hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
