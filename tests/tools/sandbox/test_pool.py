"""The sandbox as a whole, with each mechanism: attacks are contained, calls are apart, and without walls nothing runs."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dapo_mcore.errors import ToolError
from dapo_mcore.tools.sandbox import mechanisms
from dapo_mcore.tools.sandbox.mechanisms import ENVIRONMENT
from dapo_mcore.tools.sandbox.pool import SandboxPool
from dapo_mcore.tools.sandbox.worker import Ending, Settings, WorkerLost
from tests.tools.sandbox.boxes import EACH_MECHANISM, LIMITS, in_pool, run, skip_without_sandbox

Check = Callable[[Ending], bool]


def fails_with(*words: str) -> Check:
    return lambda ending: ending.ended == "exit" and ending.status == 1 and all(word in ending.head for word in words)


def prints(text: str) -> Check:
    return lambda ending: (ending.ended, ending.status, ending.head) == ("exit", 0, text)


def killed(how: str) -> Check:
    return lambda ending: ending.ended == how


NOT_PERMITTED = fails_with("Operation not permitted")

ESCAPES: dict[str, tuple[str, Check]] = {
    "network": ("import urllib.request as u; u.urlopen('http://127.0.0.1:1/')", NOT_PERMITTED),
    "unix socket": ("import socket; socket.socket(socket.AF_UNIX)", NOT_PERMITTED),
    "own environment": (f"import os; sorted(set(os.environ) - {set(ENVIRONMENT)!r} - {{'PWD'}})", prints("[]\n")),
    "other environment": ("open('/proc/1/environ').read()", fails_with("FileNotFoundError")),
    "fork bomb": ("import os\nwhile True: os.fork()", NOT_PERMITTED),
    "thread bomb": (
        "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=(0.1,)).start()",
        fails_with("can't start new thread"),
    ),
    "program": ("import subprocess; subprocess.run(['/usr/bin/id'])", NOT_PERMITTED),
    "link": ("import os; os.symlink('$KEY', 'l'); open('l').read()", fails_with("Error")),
    "key": ("open('$KEY').read()", fails_with("Error")),
    "home": ("import os; os.listdir('$HOME')", fails_with("Error")),
    "orphan daemon": (
        "import subprocess; subprocess.Popen(['/usr/bin/sleep', '60'], start_new_session=True)",
        NOT_PERMITTED,
    ),
    "daemon thread": (
        "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        prints(""),
    ),
    "endless output": ("while True: print('x' * 1000)", killed("flood")),
    "memory bomb": ("x = bytearray(10**6)\nwhile True: x = x + x", fails_with("MemoryError")),
    "shared memory bomb": ("import mmap; mmap.mmap(-1, 10**9)", fails_with("Cannot allocate memory")),
    "disk bomb": (
        "for n in range(99): open(f'f{n}', 'wb').write(bytes(10**6))",
        fails_with("No space left on device"),
    ),
    "memory file": ("import os; os.memfd_create('m')", fails_with("Function not implemented")),
    "signal to the trainer": ("import os; os.kill($TRAINER, 9)", fails_with("No such process")),
    "signal to all": ("import os; os.kill(-1, 9)", fails_with("No such process")),
    "writing outside": ("open('/usr/x', 'w')", fails_with("Error")),
    "writing beside the key": ("open('$KEY.2', 'w')", fails_with("Error")),
    "endless loop": ("while True: pass", killed("timeout")),
    "crash": ("import ctypes; ctypes.string_at(0)", killed("signal")),
    "output before the timeout": (
        "print('before')\nwhile True: pass",
        lambda e: (e.ended, e.head) == ("timeout", "before\n"),
    ),
    "closed output": ("import os, time; os.close(1); os.close(2); time.sleep(60)", killed("timeout")),
    "raised limit": (
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)",
        fails_with("not allowed to raise maximum limit"),
    ),
    "namespace": ("import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))", prints("-1\n")),
    "pointer to the template": ("import os; os.getppid()", prints("0\n")),
}


ENDLESS = ("endless loop", "output before the timeout", "closed output")
"""Attacks that only their timeout ends."""


@pytest.fixture
def key() -> Iterator[Path]:
    """A file outside pytest's private folders, which any user could read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "key").write_text("a planted secret")
    yield folder / "key"
    shutil.rmtree(folder)


@EACH_MECHANISM
def test_attacks_are_contained_and_other_calls_succeed_beside_them(mechanism: str, key: Path):
    stands_for = {"$KEY": str(key), "$HOME": str(Path.home()), "$TRAINER": str(os.getpid())}

    async def attack(pool: SandboxPool) -> tuple[list[Ending], list[Ending]]:
        codes = [code for code, _ in ESCAPES.values()]
        for word, value in stands_for.items():
            codes = [code.replace(word, value) for code in codes]
        limits = [1.0 if name in ENDLESS else 30.0 for name in ESCAPES]
        attacks = [pool.run(code, limit, 4000) for code, limit in zip(codes, limits)]
        others = [pool.run(f"sum(range({n}))", 30.0, 100) for n in range(len(codes))]
        endings = await asyncio.gather(*[call for pair in zip(attacks, others) for call in pair])
        return endings[::2], endings[1::2]

    before = psutil.Process().children(recursive=True)
    attacks, others = in_pool(mechanism, attack, num_workers=3)
    escaped = {name: ending for (name, (_, held)), ending in zip(ESCAPES.items(), attacks) if not held(ending)}
    assert escaped == {}
    assert [ending.head for ending in others] == [f"{n * (n - 1) // 2}\n" for n in range(len(ESCAPES))]
    assert not any("planted" in ending.head + ending.tail for ending in attacks)
    assert [path.name for path in key.parent.iterdir()] == ["key"]
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []


@EACH_MECHANISM
def test_what_one_call_plants_the_next_does_not_find(mechanism: str):
    plant = """
import builtins, math, os, random, sys
open("/tmp/flag", "w").write("x")
os.environ["FLAG"] = "x"
builtins.flag = sys.flag = math.flag = "x"
sys.modules["flag"] = sys
os.umask(0o777)
print(random.random())
"""
    look = """
import builtins, math, os, random, sys
print(sorted(os.listdir("/tmp")), "FLAG" in os.environ, hasattr(builtins, "flag"), hasattr(math, "flag"))
print("flag" in sys.modules, oct(os.umask(0)), [fd for fd in range(3, 64) if os.path.exists(f"/dev/fd/{fd}")])
random.random()
"""
    planted, found, again = run(mechanism, plant, look, look)
    lines = found.head.splitlines()
    pythons = sorted({Path(path).parts[2] for path in mechanisms.readable_paths() if path.startswith("/tmp/")})
    assert lines[0] == f"{pythons} False False False" and lines[1].startswith("False 0o") and lines[1].endswith("[]")
    assert "777" not in lines[1]
    assert len({planted.head.strip(), lines[2], again.head.splitlines()[2]}) == 3, "calls share a random stream"


@EACH_MECHANISM
def test_output_of_a_megabyte_comes_back_cut_and_does_not_block(mechanism: str):
    (ending,) = run(
        mechanism, "print('a' * 600_000)\nimport sys; sys.stderr.write('b' * 400_000)\nNone", output_bytes=1000
    )
    assert (ending.ended, ending.status) == ("exit", 0)
    assert ending.head == "a" * 1000 and ending.tail == "b" * 1000
    assert ending.left_out == 600_001 + 400_000 - 2000


@EACH_MECHANISM
def test_a_cancelled_call_is_killed_and_its_worker_goes_on(mechanism: str):
    async def cancel(pool: SandboxPool) -> tuple[str, int]:
        call = asyncio.ensure_future(pool.run("import time; time.sleep(600)", 600.0, 100))
        waiting = asyncio.ensure_future(pool.run("1", 5.0, 100))
        await asyncio.sleep(0.2)
        call.cancel()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        children = len(psutil.Process().children())
        return (await pool.run("2", 5.0, 100)).head, len(psutil.Process().children()) - children

    assert in_pool(mechanism, cancel, num_workers=1) == ("2\n", 0)


@EACH_MECHANISM
def test_a_killed_worker_is_replaced_and_its_call_runs_again(mechanism: str):
    before = psutil.Process().children(recursive=True)

    async def kill(pool: SandboxPool) -> str:
        call = asyncio.ensure_future(pool.run("import time; time.sleep(0.5); 'done'", 30.0, 100))
        await asyncio.sleep(0.2)
        for process in psutil.Process().children(recursive=True):
            if process not in before:
                with suppress(psutil.NoSuchProcess):  # it ends with its parent
                    process.kill()
        return (await call).head

    assert in_pool(mechanism, kill, num_workers=1) == "done\n"


def test_waiting_for_a_worker_does_not_count_as_the_calls_time():
    async def queue(pool: SandboxPool) -> list[str]:
        calls = [pool.run("import time; time.sleep(0.4)", 1.5, 100) for _ in range(5)]
        return [ending.ended for ending in await asyncio.gather(*calls)]

    assert in_pool("auto", queue, num_workers=1) == ["exit"] * 5


def start(mechanism: str, *preload: str) -> None:
    async def once() -> None:
        pool = SandboxPool(mechanism, 1, Settings(LIMITS, preload))
        try:
            await pool.start()
        finally:
            await pool.close()

    asyncio.run(once())


def test_without_bubblewrap_and_namespaces_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = [sys.executable, "-c", "raise SystemExit('unshare: Operation not permitted')"]
    monkeypatch.setitem(mechanisms.MECHANISMS, "namespaces", lambda settings: refused)
    with pytest.raises(ToolError) as error:
        start("auto")
    for words in (
        "no model-written code runs",
        "bubblewrap: ",
        "namespaces: ",
        "not permitted",
        "apt-get install bubblewrap",
    ):
        assert words in str(error.value)


def test_a_bubblewrap_that_builds_no_walls_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The cells' own walls still hold, but the canary sees the files of the machine."""
    if os.geteuid() != 0:
        pytest.skip("without a box only root can wall in a cell")
    root = Path(mechanisms.__file__).parents[3]
    fake = tmp_path / "bwrap"
    fake.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"command = [word.replace({mechanisms._ROOT!r}, {str(root)!r}) for word in sys.argv]\n"
        "start = command.index('-I') - 1\nos.execv(command[start], command[start:])\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ToolError, match=r"does not hold here: .*see_hidden_files.*No model-written code runs"):
        start("bubblewrap")


def test_an_unknown_module_is_named():
    skip_without_sandbox()
    with pytest.raises(ToolError, match=r"No module named 'no_such_module'; change sandbox\.preload"):
        start("auto", "no_such_module")


def test_no_process_outlives_a_trainer_that_is_killed():
    code = """
import asyncio, sys
from tests.tools.sandbox.boxes import LIMITS
from dapo_mcore.tools.sandbox.pool import SandboxPool
from dapo_mcore.tools.sandbox.worker import Settings
async def main():
    pool = SandboxPool("MECHANISM", 1, Settings(LIMITS))
    await pool.start()
    call = asyncio.ensure_future(pool.run("import time; time.sleep(600)", 600.0, 100))
    await asyncio.sleep(0.3)
    print("running", flush=True)
    await call
asyncio.run(main())
"""
    for mechanism in mechanisms.MECHANISMS:
        in_pool(mechanism, lambda pool: asyncio.sleep(0))
        command = [sys.executable, "-c", code.replace("MECHANISM", mechanism)]
        trainer = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()})
        assert trainer.stdout is not None and trainer.stdout.readline() == b"running\n"
        inside = psutil.Process(trainer.pid).children(recursive=True)
        assert inside
        trainer.kill()
        trainer.wait()
        _, alive = psutil.wait_procs(inside, timeout=30)
        assert alive == [], mechanism


def test_an_ordinary_user_has_a_sandbox_too():
    """The same checks as at any start, as the user nobody: root's powers must not be what holds the walls up."""
    if os.geteuid() != 0:
        pytest.skip("the other tests run as an ordinary user already")
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        package = Path(mechanisms.__file__).parents[2]
        shutil.copytree(package / "tools", folder / "dapo_mcore" / "tools")
        for name in ("__init__.py", "errors.py"):
            shutil.copy(package / name, folder / "dapo_mcore")
        python = _python_of_nobody()
        code = """
import asyncio, sys
from dapo_mcore.tools.sandbox.inside.cell import Limits
from dapo_mcore.tools.sandbox.pool import SandboxPool
from dapo_mcore.tools.sandbox.worker import Settings
async def main():
    for mechanism in ("bubblewrap", "namespaces"):
        pool = SandboxPool(mechanism, 1, Settings(Limits(20, 512, 8, 16)))
        try:
            await pool.start()
            print(mechanism, (await pool.run("6 * 7", 10.0, 100)).head)
        finally:
            await pool.close()
asyncio.run(main())
"""
        done = subprocess.run(
            [python, "-c", code], user=65534, group=65534, extra_groups=[], capture_output=True, text=True,
            env={"PYTHONPATH": str(folder), "PATH": os.environ["PATH"], "HOME": "/nonexistent", "FLAG": "x"}, cwd="/",
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    if "no sandbox works here" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.stdout.split() == ["bubblewrap", "42", "namespaces", "42"], done.stderr


def _python_of_nobody() -> str:
    for python in (sys.executable, "/usr/bin/python3"):
        check = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if (
                subprocess.run(check, user=65534, group=65534, extra_groups=[], capture_output=True, cwd="/").returncode
                == 0
            ):
                return python
        except OSError:
            continue
    pytest.skip("no Python of 3.11 or later that the user nobody may start")


@pytest.mark.bench
@EACH_MECHANISM
def test_200_calls_at_once(mechanism: str, capsys: pytest.CaptureFixture[str]):
    async def calls(pool: SandboxPool) -> tuple[float, list[Ending]]:
        await pool.run("1", 30.0, 100)
        start_s = time.monotonic()
        endings = await asyncio.gather(*(pool.run(f"print({n} ** 2)", 30.0, 100) for n in range(200)))
        return time.monotonic() - start_s, endings

    seconds, endings = in_pool(mechanism, calls, num_workers=os.cpu_count() or 1)
    assert [ending.head for ending in endings] == [f"{n**2}\n" for n in range(200)]
    cpu_ms = 1000 * sum(ending.cpu_seconds for ending in endings) / 200
    slowest_ms = 1000 * max(ending.seconds for ending in endings)
    with capsys.disabled():
        print(
            f"\n{mechanism}: 200 calls on {os.cpu_count()} cores in {seconds:.2f} s, {200 / seconds:.0f} a second; "
            f"{cpu_ms:.1f} ms of CPU a call, the slowest {slowest_ms:.0f} ms"
        )


def test_a_lost_worker_is_an_infrastructure_failure(monkeypatch: pytest.MonkeyPatch):
    async def lose(pool: SandboxPool) -> None:
        async def lost(*_: object) -> Ending:
            raise WorkerLost("gone")

        monkeypatch.setattr("dapo_mcore.tools.sandbox.worker.Worker.run", lost)
        with pytest.raises(WorkerLost):
            await pool.run("1", 5.0, 100)
        monkeypatch.undo()

    in_pool("auto", lose, num_workers=1)
