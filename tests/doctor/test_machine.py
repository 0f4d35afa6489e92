from __future__ import annotations

import resource
from pathlib import Path

import pytest

from dapo_mcore.doctor import machine
from dapo_mcore.doctor.finding import State

GIB = 2**30
ANY = resource.RLIM_INFINITY
MOUNTS = "/dev/vda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n"


@pytest.mark.parametrize(
    ("found", "detail", "remedy"),
    [
        (machine.check_memory(512 * GIB, 500 * GIB, 64 * GIB), "may use 64.0 GiB", "sbatch --mem=0"),
        (machine.check_shared_memory(GIB // 16, GIB // 16), "0.1 of 0.1 GiB", "docker run --shm-size"),
        (machine.check_open_files(1024, 1024), "at most 1024 (ulimit -Hn)", "ulimit -Hn 4096"),
        (machine.check_locked_memory(64 * 1024, True)[0], "at most 64 KiB (ulimit -l)", "memlock=-1"),
        (machine.check_cpus(1, 128, 8), "1 of 128 for this process, and 8 ranks share them", "srun --cpus-per-task"),
        (machine.check_numa(2, True)[0], "2 nodes", "sysctl kernel.numa_balancing=0"),
        (machine.check_clock(5), "nothing keeps it in time", "chrony"),
        (machine.check_temporary("/scratch/" + "x" * 60)[0], "has 69 bytes; with more than 39", "export TMPDIR=/tmp"),
        (
            machine.check_cache("TRITON_CACHE_DIR", Path("/home/me/.triton"), MOUNTS)[0],
            "nfs4 (/home)",
            "export TRITON_CACHE_DIR=/tmp/triton_cache_dir-$USER-$SLURM_JOB_ID",
        ),
    ],
)
def test_what_may_stop_a_run_is_a_hint_with_its_remedy(found, detail: str, remedy: str) -> None:
    assert found.state is State.HINT
    assert detail in found.detail
    assert remedy in found.remedy


def test_a_sound_machine_has_no_hints() -> None:
    found = [
        machine.check_memory(GIB, GIB, None),
        machine.check_memory(GIB, GIB, 2**62),
        machine.check_shared_memory(8 * GIB, 8 * GIB),
        machine.check_open_files(1024, ANY),
        machine.check_cpus(8, 8, 8),
        *machine.check_numa(2, False),
        machine.check_clock(0),
        machine.check_clock(None),
    ]
    assert [f for f in found if f.state is not State.OK] == []
    nothing = [
        machine.check_locked_memory(65536, False),
        machine.check_locked_memory(ANY, True),
        machine.check_numa(1, True),
    ]
    nothing += [
        machine.check_temporary("/" + "x" * 38),
        machine.check_cache("TRITON_CACHE_DIR", Path("/tmp/triton"), MOUNTS),
    ]
    assert nothing == [[], [], [], [], []]


def test_the_least_limit_around_a_cgroup_counts(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("two", "0::/slurm/job_7/step_0\n")
    write("v2/slurm/job_7/step_0/memory.max", "max\n")
    write("v2/slurm/job_7/memory.max", "4000\n")
    write("v2/slurm/memory.max", "9000\n")
    assert machine.cgroup_limit(tmp_path / "two", tmp_path / "v2") == 4000
    write("one", "9:name=systemd:/\n4:cpu,memory:/a\n0::/\n")
    write("v1/memory/a/memory.limit_in_bytes", "9223372036854771712\n")
    assert machine.cgroup_limit(tmp_path / "one", tmp_path / "v1") is None
    write("v1/memory/memory.limit_in_bytes", "5000\n")
    assert machine.cgroup_limit(tmp_path / "one", tmp_path / "v1") == 5000
    assert machine.cgroup_limit(tmp_path / "nothing", tmp_path) is None


def test_each_cache_of_compiled_kernels_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {"TORCHINDUCTOR_CACHE_DIR": "/home/me/inductor"}
    assert machine.caches(given) == [
        ("TRITON_CACHE_DIR", Path("/home/me/.triton")),
        ("TORCHINDUCTOR_CACHE_DIR", Path("/home/me/inductor")),
    ]
    assert machine.caches({"TRITON_CACHE_DIR": "/tmp/t"})[0] == ("TRITON_CACHE_DIR", Path("/tmp/t"))


def test_what_a_run_may_use_is_within_the_cgroups_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: 1000)
    assert machine.usable_memory() == 1000
    monkeypatch.setattr(machine, "memory_limit", lambda: None)
    assert machine.usable_memory() > 1000


def test_this_machine_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://p:1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "^lo")
    found = {found.name: found for found in machine.check_machine(["10.0.0.7"], on_gpu=False)}
    assert {"memory", "open files", "CPUs", "clock"} <= found.keys()
    assert "10.0.0.7" in found["proxies"].detail
    assert found["GLOO_SOCKET_IFNAME"].state is State.WRONG
