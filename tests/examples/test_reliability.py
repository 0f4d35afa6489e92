"""The page examples/reliability.md: its messages are in the program, and every fault has tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch

from tests.examples.reliability_page import ROOT, messages, table

TORCHRUN = Path(torch.__file__).parent / "distributed/elastic/multiprocessing/errors/__init__.py"


def texts() -> str:
    """Return every text of the program. A value that is put into a text, and the end of one, are a null character."""
    found = []
    for path in [*(ROOT / "dapo_mcore").rglob("*.py"), TORCHRUN]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\0".join(found)


def test_every_message_on_the_page_is_in_the_program():
    program = texts()
    parts = [(fault, part) for fault, told in messages().items() for message in told for part in message]
    assert len(parts) > 30
    assert [pair for pair in parts if pair[1] not in program] == []


def test_every_fault_has_tests():
    named = {
        fault: re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", cell)
        for fault, cell in table(ROOT / "tests/README.md", "fault")
    }
    assert list(named) == list(messages()) and len(named) == 17
    for fault, tests in named.items():
        assert tests, fault
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{fault}: {file} has no {name}"
