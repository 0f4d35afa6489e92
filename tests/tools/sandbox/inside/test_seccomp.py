"""The filter of system calls, run by a small interpreter of its instructions; test_canary.py shows it in a real process."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from dapo_mcore.tools.sandbox.inside.seccomp import build_filter

ALLOW, KILL = 0x7FFF_0000, 0x8000_0000
NOT_PERMITTED, MISSING = 0x0005_0000 | errno.EPERM, 0x0005_0000 | errno.ENOSYS
ARCHITECTURES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}


def answer(machine: str, number: int, first_argument: int = 0, architecture: int | None = None) -> int:
    data = struct.pack("=IIQQ", number, architecture or ARCHITECTURES[machine], 0, first_argument)
    program = list(struct.iter_unpack("=HBBI", build_filter(machine)))
    at, accumulator = 0, 0
    while True:
        code, jump_true, jump_false, value = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x15:
            at += jump_true if accumulator == value else jump_false
        elif code == 0x45:
            at += jump_true if accumulator & value else jump_false
        else:
            return value


@pytest.mark.parametrize(
    ("machine", "read", "socket", "clone", "ptrace", "execve"),
    [("x86_64", 0, 41, 56, 101, 59), ("aarch64", 63, 198, 220, 117, 221)],
)
def test_reading_is_allowed_and_sockets_processes_and_programs_are_not(machine, read, socket, clone, ptrace, execve):
    assert answer(machine, read) == ALLOW
    assert {answer(machine, number) for number in (socket, ptrace, execve)} == {NOT_PERMITTED}
    assert answer(machine, clone, 0x1_0000 | 0x100) == ALLOW  # a thread
    assert answer(machine, clone, 17) == NOT_PERMITTED  # a process
    assert {answer(machine, number) for number in (435, 425, 426, 434, 438, 460, 9999)} == {
        MISSING
    }  # clone3, io_uring, …


def test_calls_of_another_architecture_kill_the_process():
    assert answer("x86_64", 0, architecture=0x4000_0003) == KILL  # 32-bit calls have other numbers
    assert answer("x86_64", 0x4000_0000) == MISSING  # x32


def test_an_unknown_machine_is_refused():
    with pytest.raises(OSError, match="no table of system calls for riscv64"):
        build_filter("riscv64")


def test_the_numbers_are_those_of_the_kernels_headers():
    from dapo_mcore.tools.sandbox.inside import seccomp

    path = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"
    if not os.path.exists(path):
        pytest.skip("no kernel headers here (Debian: linux-libc-dev)")
    with open(path) as file:
        numbers = {words[1].removeprefix("__NR_"): words[2] for line in file if len(words := line.split()) == 3}
    entries = [entry.split() for entry in (seccomp._ALLOWED + seccomp._REFUSED).replace("\n", ";").split(";")]
    assert [name for name, number, _ in filter(None, entries) if numbers[name] != number] == []
