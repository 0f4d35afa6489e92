"""JSON over HTTP through one connection pool, for thousands of requests in flight.

Change here: pooling, limits, and which answers mean that another try may succeed. What is said is api.py.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from dapo_mcore.errors import ConfigError, RolloutError

# uvicorn closes a connection that was idle for 5 s; one that we close first is never found dead by the next request.
_KEEP_ALIVE_S = 2.0
_SPARE_FILES = 256
_MAX_BYTES = 64 << 20


def decode_json(raw: bytes | bytearray) -> Any:
    """What the JSON holds; the text where it is none."""
    try:
        return json.loads(raw) if raw else None
    except ValueError:
        return raw.decode(errors="replace")


class RequestFailed(RolloutError):
    """Nobody answered, or too late, or with a server error: another try, or another server, may succeed."""


class RequestRefused(RolloutError):
    """The server understood and said no (HTTP 4xx): the same request would be refused again."""

    def __init__(self, url: str, status: int, message: str):
        super().__init__(f"{url} refused with HTTP {status}: {message}")
        self.url, self.status, self.message = url, status, message


class HttpClient:
    """Use it inside one event loop, and close it there."""

    def __init__(self, connect_timeout_s: float, read_timeout_s: float):
        self._connect_timeout_s, self._read_timeout_s = connect_timeout_s, read_timeout_s
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector)
        self._turn = asyncio.Lock()

    async def call(
        self,
        method: str,
        url: str,
        body: Any = None,
        key: str | None = None,
        timeout_s: float = 60.0,
        decode: Callable[[bytearray], Any] = decode_json,
        max_bytes: int = _MAX_BYTES,
    ) -> Any:
        """What `decode` makes of the answer.

        timeout_s runs from sending to the end of the answer; the answer itself may take read_timeout_s, so a server that
        drips is given up, and one whose answer is longer than max_bytes. Raises RequestFailed, RequestRefused, and what
        `decode` raises.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else msgspec.json.encode(body)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=self._connect_timeout_s)
        try:
            async with self._session.request(method, url, data=data, headers=headers, timeout=timeout) as response:
                async with asyncio.timeout(self._read_timeout_s):
                    raw = await _read(url, response, max_bytes)
        except aiohttp.ConnectionTimeoutError as error:
            raise RequestFailed(f"{url} took no connection within {self._connect_timeout_s:g} s") from error
        except TimeoutError as error:
            raise RequestFailed(f"{url} gave no whole answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise RequestFailed(f"{url}: {error or type(error).__name__}") from error
        if response.status >= 400:
            raise _refusal(url, response.status, decode_json(raw))
        async with self._turn:  # one in each turn of the loop: others must not wait while thousands are decoded
            await asyncio.sleep(0)
            return decode(raw)

    async def close(self) -> None:
        await self._session.close()


def allow_open_files(connections: int) -> None:
    """Raises this process's soft limit of open files to what `connections` need; ConfigError where it may not."""
    needed = connections + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{connections} requests in flight need {needed} open files, but this process may open {hard} (ulimit -Hn); "
            f"lower rollout.sglang.max_in_flight or raise the limit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


async def _read(url: str, response: aiohttp.ClientResponse, max_bytes: int) -> bytearray:
    raw = bytearray()
    async for part in response.content.iter_any():
        raw += part
        if len(raw) > max_bytes:
            response.close()
            raise RequestFailed(f"{url} sent more than the {max_bytes} bytes that its whole answer may have")
    return raw


def _refusal(url: str, status: int, answer: Any) -> RolloutError:
    message = _message(answer)
    if status >= 500 or status in (408, 429):
        return RequestFailed(f"{url} answered HTTP {status}: {message}")
    return RequestRefused(url, status, message)


def _message(answer: Any) -> str:
    """SGLang says what is wrong as {"error": {"message": …}}, {"error": …}, {"message": …} or plain text."""
    if isinstance(answer, dict):
        inner = answer.get("error", answer.get("message", answer))
        answer = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(answer)[:500]
