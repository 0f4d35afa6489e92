"""A Hugging Face hub on loopback, as huggingface_hub speaks to it: repo_info, the tree, and files with HEAD and GET.

Sources: huggingface_hub 2.4.0 and 0.36.2, hf_api.py (repo_info, list_repo_tree) and file_download.py (get_hf_file_metadata).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
"""The commit of every repository; `main` and `v1` name it."""
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class FakeHub(ThreadingHTTPServer):
    """repos  files by path, of repositories by kind and name: {"models/Org/Name": {"config.json": b"{}"}}.

    `asked` counts requests by method and path.
    """

    daemon_threads = True

    def __init__(self, repos: Mapping[str, Mapping[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.asked = repos, Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked[f"{self.command} {path}"] += 1
        if found := _API.fullmatch(path):
            self._api(*found.groups())
        elif found := _FILE.fullmatch(path):
            self._file("datasets" if found[1] else "models", *found.groups()[1:])
        else:
            self._answer(404, b"")

    do_HEAD = do_GET

    def _files(self, kind: str, name: str, revision: str) -> Mapping[str, bytes] | None:
        files = self.server.repos.get(f"{kind}/{name}")
        if files is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return files
        return None

    def _api(self, kind: str, name: str, what: str, revision: str) -> None:
        if (files := self._files(kind, name, revision)) is None:
            return
        if what == "tree":
            told = [
                {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
                for path, content in files.items()
            ]
        else:
            told = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
        self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        if (files := self._files(kind, name, revision)) is None:
            return
        if path not in files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self._answer(200, files[path], {"ETag": f'"{_etag(files[path])}"', "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def fake_hub(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[FakeHub]:
    """Serve these repositories in a thread."""
    with FakeHub(repos) as hub:
        Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
