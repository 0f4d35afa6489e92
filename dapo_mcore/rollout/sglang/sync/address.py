"""Which machine an address belongs to, as far as this machine can tell.

Change here: how servers on other machines are told from those on this one.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit


def on_other_machines(urls: Iterable[str]) -> list[str]:
    """Return those of `urls` that are not at an address of this machine."""
    return [url for url in urls if not _is_here(urlsplit(url).hostname)]


def is_loopback(host: str) -> bool:
    """Return True if the address means the machine itself on every machine."""
    found = [ipaddress.ip_address(address[0].partition("%")[0]) for *_, address in _addresses(host)]
    return bool(found) and all(address.is_loopback for address in found)


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
