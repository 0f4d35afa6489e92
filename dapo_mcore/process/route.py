"""The interface on the way to another node of the job: `python -m dapo_mcore.process.route HOST` prints its name.

Change here: how an address becomes an interface. A host's own name is no help: on many systems it means 127.0.1.1.
"""

from __future__ import annotations

import socket
import sys

import psutil

from dapo_mcore.process.launcher import routed_address


def interface_towards(host: str) -> str:
    """Return the name of this machine's interface on the way to `host`, as GLOO_SOCKET_IFNAME needs it; "" if it has no name.

    Raise OSError if there is no way.
    """
    own = routed_address({"MASTER_ADDR": host})
    named = ((name, entry.address) for name, entries in psutil.net_if_addrs().items() for entry in entries)
    return next((name for name, address in named if address == own), "")


def main(host: str) -> int:
    """Print the interface on the way to the host. Return 2 if there is none."""
    try:
        print(interface_towards(host))
    except OSError as error:
        print(
            f"error: {socket.gethostname()} cannot reach {host}, another node of the job: {error.strerror or error}; every node "
            "must resolve the others' NodeAddr (scontrol show node), in a container too",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
