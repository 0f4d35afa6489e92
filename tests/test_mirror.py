"""Tests mirror the tree: dapo_mcore/a/b.py has tests/a/test_b.py, and no test file imports another."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules() -> Iterator[tuple[Path, Path]]:
    """Yield each module and the path of its tests."""
    for folder, tests in ((ROOT / "dapo_mcore", ROOT / "tests"), (ROOT / "kernels", ROOT / "tests" / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            if not path.name.startswith("__"):
                yield path, tests / path.relative_to(folder).with_name(f"test_{path.name}")


def imported(path: Path) -> Iterator[str]:
    """Yield the last part of every module or name that a file imports. Files that import nothing of tests are not parsed."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source if re.search(r"(from|import) tests\b", source) else "")):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "").rpartition(".")[2], *(alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name.rpartition(".")[2] for alias in node.names)


def test_every_module_has_tests_at_its_mirrored_path() -> None:
    pairs = list(modules())
    assert len(pairs) > 100, "the search found no modules"
    assert [str(tests.relative_to(ROOT)) for _, tests in pairs if not tests.is_file()] == []


def test_no_test_file_imports_another() -> None:
    """What several files use is in a module with a plain name."""
    files = list((ROOT / "tests").rglob("*.py"))
    names = {path.stem for path in files if path.name.startswith("test_")}
    assert len(names) > 100, "the search found no tests"
    assert [f"{path.relative_to(ROOT)}: {name}" for path in files for name in imported(path) if name in names] == []
