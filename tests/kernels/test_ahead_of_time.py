"""Every Triton kernel compiles for sm_90 without a GPU, spills no registers, and sums equally in scoring and training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """Return a record per compiled kernel, then the names of all kernels, from a separate process.

    TRITON_INTERPRET is unset there: the other kernel tests set it, and then nothing would be compiled.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(ROOT / "tests" / "kernels" / "ahead_of_time.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_is_compiled(records):
    *compiled, last = records
    assert set(last["kernels"]) == {record["kernel"] for record in compiled}, "see CALLS in ahead_of_time.py"


def test_no_kernel_spills_registers(records, capsys):
    with capsys.disabled():
        print(f"\n{'kernel':<44} {'registers':>9} {'shared':>7} {'warps':>5}  case")
        for r in records[:-1]:
            print(f"{r['kernel']:<44} {r['registers']:>9} {r['shared']:>7} {r['warps']:>5}  {r['case']}")
    assert {record["case"]: record["spilled"] for record in records[:-1] if record["spilled"]} == {}


def test_a_gradient_in_the_memory_of_wider_logits_is_written_after_every_warp_has_read(records):
    """The last loop of the kernel has the reads of a block, a barrier, and its writes."""
    shared = [r for r in records[:-1] if "float32: gradient in bfloat16" in r["case"]]
    assert len(shared) >= 8 and all(re.search(r"wbw*(r+b+w+)+$", r["accesses"]) for r in shared), shared


def test_scoring_adds_in_the_order_of_training(records):
    """Otherwise, on a GPU, the log-probs of the two passes would differ in their last bits, and the ratio from 1."""
    rows = [r for r in records[:-1] if r["kernel"] == "policy_loss.kernel.row_losses_kernel" and r["sum_layouts"]]
    orders: dict[str, set[str]] = {}
    for record in rows:
        orders.setdefault(record["case"].split(":")[0], set()).update(record["sum_layouts"])
    assert len(orders) >= 4 and all(len(layouts) == 1 for layouts in orders.values()), orders
    scored = {record["case"].split(":")[0] for record in rows if record["case"].endswith("score")}
    assert scored == set(orders)


@pytest.mark.parametrize(("width", "block"), [(27_648, 2_048), (768, 1_024)])
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_swiglu_reads_and_writes_every_number_once_in_accesses_of_16_bytes(records, width, block, dtype, itemsize):
    """A forward step of `block` columns reads gate and up and writes y; a backward step reads dy, too, and writes two gradients."""
    expected = {"swiglu_kernel": (2, 1), "swiglu_gradient_kernel": (3, 2)}
    for weighted in ("", ", weighted"):
        case = f"width {width} in {dtype}{weighted}"
        found = {r["kernel"].split(".")[-1]: r["wide_bytes"] for r in records[:-1] if r["case"] == case}
        numbers = {name: (b["ld"] / block / itemsize, b["st"] / block / itemsize) for name, b in found.items()}
        assert numbers == expected, case


def test_an_h100_rounds_to_e4m3_by_its_own_conversion_and_holds_two_tiles(records):
    """Two numbers per instruction. With 16 warps two programs fit on a multiprocessor if a thread has at most 64 registers."""
    found = [r for r in records[:-1] if r["kernel"].startswith("fp8_quant")]
    for r in found:
        assert bool(r["e4m3_conversions"]) is ("integer" not in r["case"]), r
    tiles = [r for r in found if "blocks" in r["kernel"] and "27648" in r["case"] and "integer" not in r["case"]]
    assert len(tiles) == 2 and all(r["warps"] == 16 and r["registers"] <= 64 for r in tiles)
    assert all(r["e4m3_conversions"] == 128 * 128 / (16 * 32) / 2 for r in tiles)
    assert all(r["wide_bytes"]["st"] == 128 * 128 for r in tiles), "all codes are stored 16 bytes at a time"
