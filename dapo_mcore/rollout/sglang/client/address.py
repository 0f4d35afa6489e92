"""Which machine an address is of, as far as this one can tell.

Change here: how servers of other machines are told from those of this one.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit


def elsewhere(urls: Iterable[str]) -> list[str]:
    """Those of `urls` that are not at an address of this machine."""
    return [url for url in urls if not is_here(urlsplit(url).hostname)]


def is_here(host: str | None) -> bool:
    """Whether a socket of this machine can have the address."""
    for family, kind, _, _, address in _addresses(host):
        with suppress(OSError), socket.socket(family, kind) as ours:
            ours.bind(address)
            return True
    return False


def is_loopback(host: str) -> bool:
    """Whether every machine has the address, and means itself."""
    found = [ipaddress.ip_address(address[0].partition("%")[0]) for *_, address in _addresses(host)]
    return bool(found) and all(address.is_loopback for address in found)


def _addresses(host: str | None) -> list:
    try:
        return socket.getaddrinfo(host or "", 0, type=socket.SOCK_STREAM)
    except OSError:
        return []
