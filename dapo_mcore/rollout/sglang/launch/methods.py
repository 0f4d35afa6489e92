"""Methods of an object in another process of the job, called by rank 0: JSON over HTTP with a secret of the run.

Change here: how such a call travels. Calls may overlap: each runs in a thread of its own.
"""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Collection
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from dapo_mcore.errors import ConfigError

CONFIG_ERROR = 422
"""HTTP status of a ConfigError; of any other exception it is 500."""
_MOST_BYTES = 1 << 24


class MethodServer:
    """Answers calls of `target`'s methods that `names` lists, at `url`, until it is closed.

    address  of this machine, as the caller reaches it.
    token    a secret of the run; requests without it are refused.
    """

    def __init__(self, address: str, token: str, target: object, names: Collection[str]):
        self._http = ThreadingHTTPServer((address, 0), partial(_Handler, target, names, f"Bearer {token}"))
        self._http.daemon_threads = True
        self.url = f"http://{address}:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, name="methods", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._http.shutdown()
        self._http.server_close()


class MethodClient:
    """Calls methods of the object at `url`."""

    def __init__(self, url: str, token: str):
        self.url, self._token = url, token
        # a proxy that the environment names would not find a node of the job
        self._opener = build_opener(ProxyHandler({}))

    def call(self, method: str, timeout_s: float, /, **arguments: Any) -> Any:
        """Return what the method returns. Raise HTTPError, with the message as JSON, if it raises, and OSError if nothing
        answers for `timeout_s`."""
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        request = Request(f"{self.url}/{method}", json.dumps(arguments).encode(), headers)
        with self._opener.open(request, timeout=timeout_s) as answer:
            return json.loads(answer.read())


class _Handler(BaseHTTPRequestHandler):
    """One request: POST /METHOD with the method's arguments as a JSON object."""

    def __init__(self, target: object, names: Collection[str], authorization: str, *connection: Any):
        self._target, self._names, self._authorization = target, names, authorization.encode()
        super().__init__(*connection)

    def do_POST(self) -> None:
        method, size = self.path.removeprefix("/"), int(self.headers.get("Content-Length", 0))
        if not hmac.compare_digest(self.headers.get("Authorization", "").encode(), self._authorization):
            self._reply(401, "wrong token")
        elif method not in self._names or size > _MOST_BYTES:
            self._reply(404, f"no method {method}")
        else:
            self._reply(*self._call(method, self.rfile.read(size)))

    def _call(self, method: str, body: bytes) -> tuple[int, Any]:
        try:
            return 200, getattr(self._target, method)(**json.loads(body))
        except ConfigError as error:
            return CONFIG_ERROR, str(error)
        except Exception as error:  # it belongs to the caller, which decides what it means
            return 500, f"{type(error).__name__}: {error}"

    def _reply(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...
