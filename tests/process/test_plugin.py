"""Users' functions by import path, and the reasons why one cannot be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo_mcore.errors import RewardError, ToolError
from dapo_mcore.process.plugin import load_function, parameters_of


def load(spec: str):
    return load_function(spec, "some.key", "built_in", ToolError)


def test_a_function_is_loaded_by_module_or_by_file(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\n")
    assert load("math:sqrt")(4) == 2
    assert load(f"{tmp_path / 'mine.py'}:double")(4) == 8


@pytest.mark.parametrize("body", ["def f(:", "1 / 0", "raise SystemExit(3)"])
def test_a_file_that_fails_on_import(tmp_path: Path, body: str):
    (tmp_path / "broken.py").write_text(body)
    with pytest.raises(ToolError, match=r"some\.key '.*' *: .*broken\.py cannot be imported"):
        load(f"{tmp_path / 'broken.py'}:f")


def test_the_error_names_the_key_and_has_the_callers_type():
    with pytest.raises(ToolError, match=r"some\.key 'nonsense' is neither built_in nor an import path"):
        load("nonsense")
    with pytest.raises(RewardError, match=r"json has no function 'absent'; its functions are: .*dumps"):
        load_function("json:absent", "reward.function", "math_dapo", RewardError)


def test_a_function_without_a_signature_takes_anything():
    assert [p.name for p in parameters_of(lambda a, *, b=1: None)] == ["a", "b"]
    assert parameters_of(dict.fromkeys)[-1].name in ("kwargs", "value")
