"""JSON over HTTP through one connection pool, for thousands of requests in flight.

Change here: pooling, limits, and which HTTP answers are worth another try. The endpoints are in api.py.
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

# uvicorn closes a connection that was idle for 5 s. We close it earlier, so that no request finds a dead connection.
_KEEP_ALIVE_S = 2.0
_NUM_SPARE_FILES = 256
_MAX_BYTES = 64 << 20


class RequestFailed(RolloutError):
    """The server did not answer in time, or answered with a server error. A retry may succeed, here or elsewhere."""


class RequestRefused(RolloutError):
    """The server answered HTTP 4xx. It would refuse the same request again."""

    def __init__(self, url: str, status: int, message: str):
        super().__init__(f"{url} refused with HTTP {status}: {message}")
        self.url, self.status, self.message = url, status, message


class HttpClient:
    """A connection pool. Use and close it inside one event loop."""

    def __init__(self, connect_timeout_s: float, read_timeout_s: float):
        self._connect_timeout_s, self._read_timeout_s = connect_timeout_s, read_timeout_s
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector)
        self._decoding = asyncio.Lock()

    async def call(
        self,
        method: str,
        url: str,
        body: Any = None,
        key: str | None = None,
        timeout_s: float = 60.0,
        decode: Callable[[bytearray], Any] | None = None,
        max_bytes: int = _MAX_BYTES,
    ) -> Any:
        """Send one request and return the decoded answer.

        timeout_s  limit from sending the request to the end of the answer. The answer itself may take read_timeout_s at
                   most, so a server that sends byte by byte is given up.
        decode     turns the answer's bytes into the result; decode_json by default.
        max_bytes  a longer answer is given up.
        Raise RequestFailed, RequestRefused, or what `decode` raises.
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
            raise _error(url, response.status, decode_json(raw))
        async with self._decoding:
            await asyncio.sleep(0)  # decode one answer per turn of the loop: other tasks run in between
            return (decode or decode_json)(raw)

    async def close(self) -> None:
        await self._session.close()


def decode_json(raw: bytes | bytearray) -> Any:
    """Return the decoded JSON, the text if it is not JSON, or None if it is empty."""
    try:
        return json.loads(raw) if raw else None
    except ValueError:
        return raw.decode(errors="replace")


def allow_open_files(num_connections: int) -> None:
    """Raise this process's soft limit of open files to what the connections need.

    Raise ConfigError if the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if (needed := open_file_limit(num_connections, soft, hard)) != soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_file_limit(num_connections: int, soft: int, hard: int) -> int:
    """Return the soft limit that the connections need, `soft` if that is enough. Raise ConfigError if `hard` is too low."""
    needed = num_connections + _NUM_SPARE_FILES
    if soft >= needed or soft == resource.RLIM_INFINITY:
        return soft
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{num_connections} connections (rollout.sglang.max_in_flight and 8 more per server) and {_NUM_SPARE_FILES} other "
            f"files need {needed} open files, but this process may open {hard} (ulimit -Hn); lower rollout.sglang.max_in_flight or raise the limit"
        )
    return needed


async def _read(url: str, response: aiohttp.ClientResponse, max_bytes: int) -> bytearray:
    raw = bytearray()
    async for part in response.content.iter_any():
        raw += part
        if len(raw) > max_bytes:
            response.close()
            raise RequestFailed(f"{url} sent more than the {max_bytes} bytes that its whole answer may have")
    return raw


def _error(url: str, status: int, answer: Any) -> RolloutError:
    message = _message(answer)
    if status >= 500 or status in (408, 429):
        return RequestFailed(f"{url} answered HTTP {status}: {message}")
    return RequestRefused(url, status, message)


def _message(answer: Any) -> str:
    """Return SGLang's error text, which is {"error": {"message": …}}, {"error": …}, {"message": …} or plain text."""
    if isinstance(answer, dict):
        inner = answer.get("error", answer.get("message", answer))
        answer = inner.get("message", inner) if isinstance(inner, dict) else inner
    return str(answer)[:500]
