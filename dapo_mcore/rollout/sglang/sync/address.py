"""Which machine an address belongs to, as far as this machine can tell, and which addresses it reaches.

Change here: how servers on other machines are told from those on this one.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit


def on_other_machines(urls: Iterable[str]) -> list[str]:
    """Return those of `urls` that are not at an address of this machine."""
    return [url for url in urls if not _is_here(urlsplit(url).hostname)]


def is_loopback(host: str) -> bool:
    """Return True if the address means the machine itself on every machine."""
    found = [ipaddress.ip_address(address[0].partition("%")[0]) for *_, address in _addresses(host)]
    return bool(found) and all(address.is_loopback for address in found)


def unreachable(urls: Sequence[str], address: str, timeout_s: float) -> list[str]:
    """Return those of `urls` that take no connection from this machine's `address` within the time limit."""
    with ThreadPoolExecutor(max(len(urls), 1)) as pool:
        found = list(pool.map(lambda url: _takes_connection(urlsplit(url), address, timeout_s), urls))
    return [url for url, reached in zip(urls, found) if not reached]


def _takes_connection(url: SplitResult, address: str, timeout_s: float) -> bool:
    default = 443 if url.scheme == "https" else 80
    try:
        socket.create_connection((url.hostname, url.port or default), timeout_s, (address, 0)).close()
    except OSError:
        return False
    return True


def _is_here(host: str | None) -> bool:
    """Return True if a socket of this machine can bind the address."""
    for family, kind, _, _, address in _addresses(host):
        with suppress(OSError), socket.socket(family, kind) as ours:
            ours.bind(address)
            return True
    return False


def _addresses(host: str | None) -> list:
    try:
        return socket.getaddrinfo(host or "", 0, type=socket.SOCK_STREAM)
    except OSError:
        return []
