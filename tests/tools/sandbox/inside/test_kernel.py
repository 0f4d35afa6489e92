"""System calls: their answers become results or OSError."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

from dapo_mcore.tools.sandbox.inside import kernel


def test_the_kernels_refusal_is_an_error_with_its_reason():
    with pytest.raises(OSError, match="mount /nowhere: ") as error:
        kernel.mount("none", "/nowhere", "no-such-file-system", 0)
    assert error.value.errno in (1, 2)  # not permitted, or no such file
    with pytest.raises(OSError, match="system call 9999: Function not implemented"):
        kernel.syscall(9999)


def test_a_process_descriptor_becomes_readable_at_its_end():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    descriptor = kernel.open_process(process.pid)
    assert select.select([descriptor], [], [], 0)[0] == []
    process.communicate(b"\n")
    assert select.select([descriptor], [], [], 10)[0] == [descriptor]
    os.close(descriptor)


def test_capabilities_and_privileges_are_given_up():
    code = """
from dapo_mcore.tools.sandbox.inside import kernel
def field(name):
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name + ":"))
kernel.keep_capabilities()
kernel.forbid_new_privileges()
print(field("CapEff"), field("CapPrm"), field("NoNewPrivs"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["0" * 16, "0" * 16, "1"], done.stderr
