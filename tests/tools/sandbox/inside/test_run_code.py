"""What a policy sees of its code: prints, the last value, errors without files of this machine, exit statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
START = "import sys; from dapo_mcore.tools.sandbox.inside.run_code import run; sys.exit(run(sys.stdin.read()))"


def run(code: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", START], input=code, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(1)\n2 + 3", "1\n5\n"),
        ("x = 5", ""),
        ("if True:\n    print('in')\n    7", "in\n"),
        ("print('once')", "once\n"),
        ("None", ""),
        ("'text'", "text\n"),
        ("# a remark\n1; 2;  # the last", "2\n"),
        ("", ""),
        ("class A: pass\n__name__", "__main__\n"),
        ("def f():\n    return 3\nf()", "3\n"),
        ("import threading\nthreading.Thread(target=print, args=('late',)).start()", "late\n"),
        ("import atexit; atexit.register(print, 'bye'); 1", "1\nbye\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(3)", "P(x=3)\n"),
    ],
)
def test_prints_and_the_last_expressions_value(code: str, printed: str):
    assert run(code) == (0, printed, "")


def test_the_traceback_has_the_codes_own_lines_and_no_path_of_this_machine():
    status, printed, errors = run("print('before')\ndef f():\n    import json\n    json.loads('{')\nf()")
    assert (status, printed) == (1, "before\n")
    lines = errors.splitlines()
    assert lines[:4] == ["Traceback (most recent call last):", '  File "<python>", line 5, in <module>', "    f()",
                         '  File "<python>", line 4, in f']  # fmt: skip
    assert '  File "json/__init__.py"' in errors and lines[-1].startswith("json.decoder.JSONDecodeError: ")
    assert "run_code" not in errors and sys.prefix not in errors and sys.base_prefix not in errors


@pytest.mark.parametrize(
    ("code", "last_line"),
    [
        ("1 +", "SyntaxError: invalid syntax"),
        ("x\0", "SyntaxError: source code string cannot contain null bytes"),
        ("raise KeyError('k')", "KeyError: 'k'"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("input()", "EOFError: EOF when reading a line"),
        ("raise SystemExit('why')", "why"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E: <exception str() failed>"),
        ("raise BaseException", "BaseException"),
        ("try:\n    1 / 0\nexcept Exception as e:\n    raise ValueError('b') from e", "ValueError: b"),
    ],
)
def test_errors_end_with_one_line_that_names_them(code: str, last_line: str):
    status, printed, errors = run(code)
    assert (status, printed, errors.splitlines()[-1]) == (1, "", last_line)


def test_exit_statuses_are_pythons():
    assert run("import sys; print(1); sys.exit(3)") == (3, "1\n", "SystemExit: 3\n")
    assert run("raise SystemExit(True)") == (1, "", "SystemExit: 1\n")
    assert run("raise SystemExit") == (0, "", "")


def test_a_long_traceback_keeps_its_last_frames():
    code = "\n".join(f"def f{n}(): f{n + 1}()" for n in range(9)) + "\ndef f9(): 1 / 0\nf0()"
    frames = [line.split()[-1] for line in run(code)[2].splitlines() if "File" in line]
    assert frames == ["f4", "f5", "f6", "f7", "f8", "f9"]


def test_code_that_breaks_its_own_output_still_ends_with_an_error():
    status, _, errors = run("import sys; sys.stderr = None; sys.stdout = None; 1 / 0")
    assert status == 1 and errors.startswith("ZeroDivisionError (its traceback cannot be printed")
