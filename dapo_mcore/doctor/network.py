"""The network as this node's processes see it: proxies, and the interfaces and addresses that gloo and NCCL choose.

Change here: a variable that sends traffic the wrong way. Each check takes what the system says.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from dapo_mcore.doctor.finding import Finding, hint, ok, wrong

_LOOPBACK = "127.0.0.1"
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_GLOO, _NCCL = INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def check_proxies(environment: Mapping[str, str], hosts: Sequence[str] = ()) -> Finding:
    """Return a hint if calls to servers of the run may go to a proxy: `no_proxy` must name localhost and the servers' hosts."""
    values = {name.lower(): value for name, value in environment.items() if value}
    proxies = [name for name in _PROXIES if name in values]
    if not proxies:
        return ok("proxies", "none")
    excepted = [word.strip() for word in values.get("no_proxy", "").split(",") if word.strip()]
    wanted = list(dict.fromkeys((_LOOPBACK, "localhost", *hosts)))
    missing = [] if "*" in excepted else [host for host in wanted if host not in excepted]
    ranges = [word for word in excepted if "/" in word]
    if not missing and not ranges:
        return ok("proxies", f"{', '.join(proxies)}, not for {', '.join(excepted)}")
    told = [f"no_proxy does not name {', '.join(missing)}"] if missing else []
    told += [f"most programs ignore {', '.join(ranges)} in no_proxy"] if ranges else []
    detail = f"{', '.join(proxies)} set, and {' and '.join(told)}: calls of Ray and of servers may go to the proxy"
    return hint("proxies", detail, f"export no_proxy={','.join(wanted)}")


def check_interfaces(environment: Mapping[str, str], interfaces: Sequence[str], on_gpu: bool) -> list[Finding]:
    """Return whether gloo and, on GPUs, NCCL find the interfaces that they are told to use.

    gloo takes plain names, NCCL also beginnings of names, `=eth0` for a whole one, and `^docker` for all others.
    """
    findings = []
    if given := environment.get(_GLOO):
        missing = [name for name in given.split(",") if name not in interfaces]
        findings.append(
            _interface(_GLOO, given, missing == [], interfaces, "one of these names (gloo knows no ^ and no =)")
        )
    if on_gpu and (given := environment.get(_NCCL)):
        found = nccl_interfaces(given, interfaces)
        findings.append(_interface(_NCCL, given, bool(found), interfaces, "the beginning of one of these names"))
    return findings


def _interface(name: str, given: str, is_found: bool, interfaces: Sequence[str], rule: str) -> Finding:
    if is_found:
        return ok(name, given)
    return wrong(name, f"{given!r} fits none of {', '.join(interfaces)}", f"set it on this node to {rule}, or unset it")


def nccl_interfaces(given: str, interfaces: Sequence[str]) -> list[str]:
    """Return the interfaces that NCCL_SOCKET_IFNAME allows."""
    sign = given[0] if given[0] in "^=" else ""
    without = given.removeprefix("^")
    exact, names = without.startswith("="), without.removeprefix("=").split(",")
    fits = {name for name in interfaces if any(name == word if exact else name.startswith(word) for word in names)}
    return [name for name in interfaces if (name in fits) != (sign == "^")]


def gloo_address(environment: Mapping[str, str], addresses: Mapping[str, Sequence[str]], hostname: str) -> str:
    """Return the address that gloo listens on: of the interface that it is told, else of the host's own name, else loopback.

    addresses  of each interface, by its name
    """
    if given := environment.get(_GLOO):
        own = addresses.get(given.split(",")[0], ())
        return next((address for address in own if _is_address(address)), _LOOPBACK)
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)]
    except OSError:
        return _LOOPBACK
    own = {address for several in addresses.values() for address in several}
    return next((address for address in found if address in own or address.startswith("127.")), _LOOPBACK)


def _is_address(text: str) -> bool:
    """Return True for an IP address. psutil lists hardware addresses among them."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text.partition("%")[0])
            return True
        except OSError:
            continue
    return False


def check_reach(unreached: Sequence[tuple[str, str, str, str]]) -> list[Finding]:
    """Return a reason for each node that others cannot reach.

    unreached  (node that tried, node, its address, error) of each failed connection
    """
    tries: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for source, node, address, error in unreached:
        tries.setdefault((node, address), []).append((source, error))
    return [_reach(node, address, found) for (node, address), found in tries.items()]


def _reach(node: str, address: str, tries: Sequence[tuple[str, str]]) -> Finding:
    sources = ", ".join(source for source, _ in tries)
    detail = f"{sources} cannot reach {node} at {address}: {tries[0][1]}"
    if address.startswith("127.") or address == "::1":
        return wrong(
            "reach",
            f"{detail}; {node} gives others its loopback address",
            f"export {_GLOO} with the name of the interface to the other nodes (ip -br address), or mend {node}'s name in "
            "/etc/hosts",
        )
    return wrong(
        "reach",
        detail,
        f"let nodes reach each other on all ports, or name an interface that they share in {_GLOO} and {_NCCL}",
    )
