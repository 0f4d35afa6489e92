"""A resumed run equals the uninterrupted one: bit for bit on the same mesh, to 1e-6 on another.

The workers (resuming.py) run in real gloo processes; each spawn checks several things, because a start takes long.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo_mcore.actor.checkpoint_blocks import CheckpointBlock
from dapo_mcore.checkpoint.checkpoint import _check_finite
from dapo_mcore.checkpoint.run_folder import latest_checkpoint
from dapo_mcore.errors import TrainingError
from tests.actor.parity import Mesh, spawn
from tests.checkpoint.resuming import STATE, interrupt_and_resume, resume_adaptive_entropy
from tests.checkpoint.resuming_ppo import data_parallel, single, tensor_parallel


def check_resumed(result: dict[str, Any]) -> None:
    assert result["moved"] and result["loaded"] and result["rounded"]
    assert result["found"] == result["expected"]
    assert result["found"][1::2] == pytest.approx([1e-3 * 3 / 8, 1e-3 * 4 / 8], rel=1e-12)
    assert result["different"] == []
    assert result["updates"] == 4
    assert result["state"] == [STATE.step, STATE.weight_version, STATE.loader, STATE.sampler, STATE.config]
    assert result["arrays"] == {n: [str(a.dtype), a.tobytes().hex()] for n, a in STATE.sampler_arrays.items()}


def test_the_adaptive_entropy_coefficient_resumes_bitwise(tmp_path: Path) -> None:
    found = spawn(resume_adaptive_entropy, Mesh(), str(tmp_path))
    assert found["coefs"] == pytest.approx([0.002, 0.003, 0.004]) and found["resumed"] == found["expected"]
    assert found["different"] == [] and found["metric"] == found["expected"][-1][0]


@pytest.fixture(scope="module")
def tensor_parallel_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    return spawn(tensor_parallel, Mesh(tensor=2), str(folder))


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_ends_every_rank_with_one_line(tensor_parallel_run: dict[str, Any], full: int) -> None:
    found = tensor_parallel_run["full"][full]
    for words in ("step_000003 cannot be written: File too large", "and start again: it goes on from", "step_000002"):
        assert words in found["told"][full]
        assert words in found["told"][1 - full]
    assert found["told"][1 - full].startswith(f"rank {full} failed: ")
    assert found["left"] == ["step_000002"]


def test_a_tensor_that_is_not_finite_on_one_rank_is_never_saved(tensor_parallel_run: dict[str, Any]) -> None:
    found = tensor_parallel_run["poisoned"]
    assert found["told"][0] == f"rank 1 failed: {found['told'][1]}"
    assert (
        "step_000003 was not saved: 1 tensors on rank 1 hold NaN or infinity, first decoder.layers." in found["told"][1]
    )
    assert "step_000002 is the last good checkpoint and stays" in found["told"][1]
    assert found["left"] == ["step_000002"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found_anywhere(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    blocks = [
        CheckpointBlock(key, (6,), (0,), torch.full((6,), torch.finfo(dtype).max, dtype=dtype), True, False)
        for key in "ab"
    ]
    _check_finite(tmp_path / "checkpoints" / "step_000001", blocks, 3)
    for at in (0, 3, 5):
        blocks[1].data[at] = bad
        with pytest.raises(
            TrainingError, match="1 tensors on rank 3 hold NaN or infinity, first b; there is no checkpoint"
        ):
            _check_finite(tmp_path / "checkpoints" / "step_000001", blocks, 3)
        blocks[1].data[at] = 0


def test_if_one_rank_finds_damage_all_ranks_take_the_checkpoint_before(tensor_parallel_run: dict[str, Any]) -> None:
    found = tensor_parallel_run["fallback"]
    assert found["resumed"] == ["step_000002", 2]
    (line,) = found["lines"]
    assert (
        line.startswith("warning: ")
        and line.count("\n") == 0
        and "rank_00001.safetensors is changed: the checksum of" in line
    )
    assert line.endswith("step_000003 was renamed to step_000003.corrupt, and the run goes on from step_000002")
    assert found["left"] == ["step_000002", "step_000003.corrupt"]
    assert found["different"] == []


def test_a_folder_gets_its_name_after_all_its_bytes_are_on_disk(single_process_run: dict[str, Any]) -> None:
    calls = single_process_run["durable"]["calls"]
    published = calls.index("rename partial → step_000002")
    before = calls[:published]
    for name in ["metrics.jsonl", *single_process_run["durable"]["files"]]:
        assert f"fsync {name}" in before, name
    assert before[-1] == "fsync partial"
    assert calls[published + 1] == "fsync checkpoints"


def test_resume_is_bitwise_with_tensor_parallelism(tensor_parallel_run: dict[str, Any]) -> None:
    check_resumed(tensor_parallel_run)


@pytest.fixture(scope="module")
def data_parallel_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    options = {"model__dtype": "bf16", "algo__kl__coef": 0.1}
    folder = tmp_path_factory.mktemp("data_parallel")
    return spawn(data_parallel, Mesh(data=2), str(folder), options)


def test_resume_is_bitwise_in_bf16_with_a_sharded_optimizer_and_a_reference_policy(
    data_parallel_run: dict[str, Any],
) -> None:
    check_resumed(data_parallel_run)


def test_data_parallel_ranks_together_read_each_byte_once(data_parallel_run: dict[str, Any]) -> None:
    found = data_parallel_run["read"]
    assert found["read"] == found["stored"] > 0


def test_a_save_beside_training_holds_the_state_of_its_step(data_parallel_run: dict[str, Any]) -> None:
    """The processes were stopped, and went on after two more gradient steps."""
    assert data_parallel_run["beside"]["before"] is False
    assert data_parallel_run["beside"]["torn"] == []


def test_after_a_failed_save_beside_training_the_next_one_is_waited_for(data_parallel_run: dict[str, Any]) -> None:
    found = data_parallel_run["beside"]["killed"]
    (line,) = found["lines"]
    told = "step_000003 was not saved beside training, since rank 1 failed: the process that writes it has ended (signal 9); the"
    assert line.startswith("warning: the checkpoint ") and told in line
    assert (found["whole"], found["in_flight"]) == (True, False)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("full", "step_000005 was not saved beside training, since rank 0 failed: File too large"),
        (
            "stalled",
            "step_000006 was not saved beside training, since rank 1 failed: the process that writes it has shown no progress for 1 s",
        ),
    ],
)
def test_a_failure_beside_training_is_told_on_every_rank_and_leaves_nothing(
    data_parallel_run: dict[str, Any], case: str, reason: str
) -> None:
    found = data_parallel_run["beside"][case]
    assert len(found["told"]) == 2 and all(reason in told for told in found["told"]), found["told"]
    assert found["left"] == ["step_000002", "step_000004"]


def test_a_save_in_flight_ends_before_its_processes_do(data_parallel_run: dict[str, Any]) -> None:
    assert data_parallel_run["beside"]["left"] == ["step_000004", "step_000007"]
    assert data_parallel_run["beside"]["ended"] == [True, True]


def test_resume_is_bitwise_with_tied_embeddings_on_two_pipeline_stages(tmp_path: Path) -> None:
    check_resumed(spawn(interrupt_and_resume, Mesh(pipeline=2), str(tmp_path), {}, True))


@pytest.fixture(scope="module")
def single_process_run(tensor_parallel_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    paths = tensor_parallel_run["path"], tensor_parallel_run["ppo"]["path"]
    return spawn(single, Mesh(), str(tmp_path_factory.mktemp("single")), *paths)


def test_resume_is_bitwise_with_the_plain_optimizer(single_process_run: dict[str, Any]) -> None:
    check_resumed(single_process_run["plain"])


def test_resume_is_bitwise_with_fp8(single_process_run: dict[str, Any]) -> None:
    """Checkpoints hold fp32 masters, and weights in bf16, which are the rounded masters; nothing holds FP8."""
    found = single_process_run["fp8"]
    check_resumed(found)
    assert found["without_fp8"] != found["expected"][::2]


@pytest.mark.parametrize("run", ["tensor_parallel_run", "data_parallel_run"])
def test_resume_is_bitwise_with_a_critic_inside_its_warm_up_and_after_it(
    run: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(run)["ppo"]
    assert found["updates"] == [0, 0, 1, 1]
    assert found["changed"] == [["critic"], ["critic", "policy"], ["critic", "policy"]]
    assert found["resumed"] == [[], []]


def test_a_critic_of_tensor_parallel_ranks_continues_in_one_process(single_process_run: dict[str, Any]) -> None:
    found = single_process_run["ppo"]
    assert found["policy"] < 1e-6 and found["critic"] < 1e-6


def test_a_tensor_parallel_checkpoint_continues_in_one_process(single_process_run: dict[str, Any]) -> None:
    found = single_process_run["reshard"]
    assert found["trace"] == pytest.approx(found["expected"], rel=1e-6)
    assert found["worst"] < 1e-6
    assert found["tensors"] == 4 * 12 + 3


def test_a_checkpoint_before_the_first_gradient_step(single_process_run: dict[str, Any]) -> None:
    for found in single_process_run["first_step"]:
        assert found["saved"] == found["resumed"] == found["expected"]
        assert found["different"] == []


def test_saving_leaves_no_process_behind(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["helpers"] == []


def test_the_configuration_sets_the_rates_and_the_checkpoint_the_position(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["settings"] == pytest.approx([5e-4 * 3 / 8, 0.25], rel=1e-12)


def test_the_newest_checkpoints_are_kept_and_unfinished_ones_deleted(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["kept"] == [
        ["step_000002"],
        ["step_000002", "step_000004"],
        ["step_000002", "step_000004"],
        ["step_000004", "step_1000000"],
        ["config.json", "manifest.json", "shards", "state.json", "state.safetensors"],
        ["config.json", "manifest.json", "shards", "state.json", "state.safetensors"],
        "step_1000000",
    ]


ERRORS = {
    "absent": ["no checkpoint at", "step_000077"],
    "no_json": ["state.json is missing"],
    "no_shard": ["rank_00000.safetensors is missing"],
    "half_shard": ["rank_00001.safetensors is truncated"],
    "bit": ["rank_00001.safetensors is changed: the checksum of "],
    "header": ["rank_00000.safetensors is changed: the checksum of its header does not hold"],
    "evil_metadata": [".metadata cannot be read: it wants posix.mkdir, which no checkpoint metadata needs"],
    "evil_common": ["common.pt is truncated or damaged: it is no pickle of plain values"],
    "untied": [
        "tied is False there and True here",
        "architecture is 'Qwen2ForCausalLM' there and 'LlamaForCausalLM' here",
    ],
    "reference": ["holds no reference policy", "algo.kl.coef is 0.1"],
}


@pytest.mark.parametrize(("case", "parts"), ERRORS.items(), ids=list(ERRORS))
def test_a_checkpoint_that_cannot_be_loaded_is_refused_with_the_reason(
    single_process_run: dict[str, Any], case: str, parts: list[str]
) -> None:
    assert all(part in single_process_run["errors"][case] for part in parts), single_process_run["errors"][case]


def test_nothing_in_a_checkpoint_is_executed(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["errors"]["ran"] == []


def test_checkpoints_of_the_first_two_formats_are_read(single_process_run: dict[str, Any]) -> None:
    assert single_process_run["old"] == [{"steps": [2.0, 2.0], "different": []}] * 2


def test_no_checkpoint_in_a_new_or_unfinished_run(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "step_000003.partial").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None


def test_the_state_file_is_readable_json(tensor_parallel_run: dict[str, Any]) -> None:
    stored = json.loads((Path(tensor_parallel_run["path"]) / "state.json").read_text())
    assert stored["train"]["loader"] == STATE.loader
    assert stored["fits"]["hidden_size"] == 64
