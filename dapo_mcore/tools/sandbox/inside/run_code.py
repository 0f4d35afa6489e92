"""Runs a text as Python's main module, as a notebook does: what it prints, and the value of its last expression.

Change here: what the policy sees of a value or an error.
"""

from __future__ import annotations

import ast
import atexit
import linecache
import os
import sys
import threading
import traceback
from types import CodeType, ModuleType

FILE_NAME = "<python>"
_LAST_FRAMES = 6


def run(code: str) -> int:
    """Run the code and print to standard output and standard error. Return its exit status.

    The last statement's value is printed if it is an expression and not None. A traceback has only the code's own frames and
    those below, the last _LAST_FRAMES of them, with files relative to Python's folders.
    """
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.stdout.reconfigure(line_buffering=True)  # else a call that is killed has printed nothing
    linecache.cache[FILE_NAME] = (len(code), None, code.splitlines(keepends=True), FILE_NAME)
    try:
        status = _run_in(module, code)
        threading._shutdown()  # wait for threads that are no daemons, as Python does at its end
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        return _exit_status(error)
    return status


def _run_in(module: ModuleType, code: str) -> int:
    try:
        body, last = _compile(code)
        exec(body, module.__dict__)
        value = eval(last, module.__dict__) if last else None
        if value is not None:
            print(value)
    except BaseException as error:
        return _exit_status(error)
    return 0


def _compile(code: str) -> tuple[CodeType, CodeType | None]:
    """Return the statements, and the last one if it is an expression."""
    tree = ast.parse(code, FILE_NAME)
    last = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = compile(ast.Expression(tree.body.pop().value), FILE_NAME, "eval")
    return compile(tree, FILE_NAME, "exec"), last


def _exit_status(error: BaseException) -> int:
    """Return the status with which Python would end after this exception. Print what it would print, and a status that is not 0."""
    try:
        if not isinstance(error, SystemExit):
            _print_traceback(error)
        elif error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        else:
            status = int(error.code or 0)
            if status:  # Python prints nothing, and a policy would not know why its code has failed
                print(f"SystemExit: {status}", file=sys.stderr)
            return status
    except BaseException as second:  # no memory is left, or the code has replaced sys.stderr
        os.write(2, f"{type(error).__name__} (its traceback cannot be printed: {type(second).__name__})\n".encode())
    return 1


def _print_traceback(error: BaseException) -> None:
    sys.stdout.flush()
    report = traceback.TracebackException.from_exception(error)
    _shorten(report)
    print("".join(report.format()), end="", file=sys.stderr, flush=True)


def _shorten(report: traceback.TracebackException | None) -> None:
    if report is None:
        return
    frames = list(report.stack)
    while frames and frames[0].filename != FILE_NAME:
        frames.pop(0)
    for frame in frames:
        frame.filename = _relative(frame.filename)
    report.stack = traceback.StackSummary.from_list(frames[-_LAST_FRAMES:])
    for other in (report.__cause__, report.__context__, *(getattr(report, "exceptions", None) or ())):
        _shorten(other)


def _relative(path: str) -> str:
    folders = [folder for folder in sys.path if folder and path.startswith(folder + os.sep)]
    return os.path.relpath(path, max(folders, key=len)) if folders else path
