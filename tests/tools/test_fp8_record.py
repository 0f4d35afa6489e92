"""The simulation of FP8 against records of Transformer Engine, as tools/gpu_check/fp8.py makes them on a GPU.

Without a record, what is shown is that the comparison finds every kind of difference, and that Transformer Engine's layouts are
read as its source describes them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dapo_mcore.actor.model.fp8_rules import FP32_SCALES, POWER_2_SCALES
from tests.tools import fake_transformer_engine
from tools.gpu_check import fp8

RECORDED = Path(__file__).parent / "recorded"
RECORDS = sorted(RECORDED.glob("*.safetensors"))


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record by the simulation, through the part's own entry."""
    folder = tmp_path_factory.mktemp("record")
    assert torch.cuda.is_available() or fp8.main(folder) == 0
    return folder / "fp8.safetensors"


def change(path: Path, changed: Path, name: str, value: torch.Tensor | None) -> list[str]:
    """Return the differences if the tensor `name` of the record at `path` had this first element; None: if it were absent."""
    with safe_open(path, framework="pt") as file:
        tensors, notes = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    if value is None:
        del tensors[name]
    else:
        tensors[name].view(-1)[:1] = value
    save_file(tensors, changed, metadata=notes)
    return fp8.compare(changed)


@pytest.mark.skipif(
    not RECORDS,
    reason=f"no record in {RECORDED}: run tools/gpu_check.sh 5 runs/gpu_check fp8 on a GPU and copy its file",
)
@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_simulation_gives_what_transformer_engine_gave(path):
    assert fp8.compare(path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal without a GPU")
def test_a_record_has_every_case_both_directions_and_what_made_it(rehearsed):
    row = json.loads(rehearsed.with_name("fp8.json").read_text())
    assert (row["source"], row["missing"], row["differences"]) == ("simulation", {}, [])
    with safe_open(rehearsed, framework="pt") as file:
        names, notes = set(file.keys()), file.metadata()
        assert file.get_tensor("mxfp8-e4m3/gradient/columns/factors").shape == (5, 224)
        assert file.get_tensor("blockwise-e4m3/weight/rows/factors").shape == (2, 3)
        assert file.get_tensor("blockwise-hybrid/gradient/rows/codes").shape == (160, 224)
    assert len(names) == 3 + len(fp8.CASES) * (3 + 3 * 4) and notes["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blockwise-e4m3/hidden/rows/codes", 255, "blockwise-e4m3 hidden/rows/codes: 1 of 46080 differ"),
        (
            "tensorwise-hybrid/gradient/columns/factors",
            2.0,
            "tensorwise-hybrid gradient/columns/factors: 1 of 1 differ",
        ),
        ("mxfp8-e4m3/weight/columns/factors", 3.0, "mxfp8-e4m3 weight/columns/factors: 1 of 2016 differ"),
        ("blockwise-hybrid/weight_gradient", 1.0, "blockwise-hybrid weight_gradient: off by"),
        ("blockwise-e4m3/output", float("nan"), "blockwise-e4m3 output: off by nan"),
    ],
)
def test_a_comparison_names_what_differs(rehearsed, tmp_path, name, value, message):
    (line,) = change(rehearsed, tmp_path / "changed.safetensors", name, value)
    assert line.startswith(message)


def test_another_input_changes_nearly_everything(rehearsed, tmp_path):
    lines = change(rehearsed, tmp_path / "changed.safetensors", "operands/hidden", 1e4)
    assert len(lines) > 10 and all("hidden" in line or "output" in line or "weight_gradient" in line for line in lines)


def test_a_record_without_products_is_no_record(rehearsed, tmp_path):
    with pytest.raises(AssertionError, match="mxfp8-e4m3 is not complete"):
        change(rehearsed, tmp_path / "changed.safetensors", "mxfp8-e4m3/output", None)


@pytest.mark.parametrize("other_scales", ["0", "1"])
def test_transformer_engines_calls_and_layouts_give_the_same_record(tmp_path, monkeypatch, other_scales):
    """Through a stand-in that has Transformer Engine's names and padded, transposed scales."""
    for variable in (FP32_SCALES, POWER_2_SCALES):
        monkeypatch.setenv(variable, other_scales)
    fake_transformer_engine.install(monkeypatch)
    assert fp8.record(fp8.TransformerEngine("cpu"), tmp_path / "fake.safetensors") == {}
    assert fp8.compare(tmp_path / "fake.safetensors") == []


def test_a_card_without_a_recipe_leaves_its_case_out(tmp_path, monkeypatch):
    fake_transformer_engine.install(monkeypatch, is_mxfp8_available=lambda return_reason: (False, "capability 10.0"))
    path = tmp_path / "fake.safetensors"
    assert fp8.record(fp8.TransformerEngine("cpu"), path) == {"mxfp8-e4m3": "capability 10.0"}
    assert fp8.compare(path) == []
    with safe_open(path, framework="pt") as file:
        assert not any(name.startswith("mxfp8") for name in file.keys())  # noqa: SIM118
