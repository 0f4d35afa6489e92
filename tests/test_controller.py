"""Rank 0's side of a run between two gradient phases. The engine is made up; data, reward and files are real."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from transformers import Qwen2Config

from dapo_mcore import controller as module
from dapo_mcore.config.schema import Config
from dapo_mcore.controller import Controller
from dapo_mcore.data.stops import Stops
from dapo_mcore.observe.progress import NullProgress
from dapo_mcore.observe.sinks import read_metrics
from dapo_mcore.observe.timing import PhaseTimer
from dapo_mcore.types import Rollout, SamplingParams


class Engine:
    """Answers 2 to every prompt, which is right for `1+1=` alone."""

    weight_version = 0

    def __init__(self, tokenizer: Any):
        self.answer = np.array(tokenizer.encode("Answer: 2", add_special_tokens=False), dtype=np.int32)
        self.calls: list[tuple[int, SamplingParams]] = []

    def generate(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Rollout]:
        self.calls.append((len(prompts), params))
        length = len(self.answer)
        one = Rollout(self.answer, np.zeros(length, np.float32), np.ones(length, bool), "stop", self.weight_version)
        return [one] * len(prompts)

    def metrics(self) -> dict[str, float]:
        return {"rollout/made_up": 1.0}

    def close(self) -> None: ...


class Lines(NullProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def settings(folder: Path, **sections: Any) -> Config:
    """Two training prompts, of which a step takes one, and one prompt to evaluate."""
    tree = {
        "output_dir": str(folder / "runs"),
        "num_rollout_steps": 3,
        "model": {"path": "unused"},
        "data": {"files": str(folder / "train.jsonl"), "answer_key": "answer", "shuffle": False},
        "eval": {
            "sets": {"held": {"files": str(folder / "held.jsonl"), "answer_key": "answer"}},
            "samples_per_prompt": 1,
        },
        "rollout": {"group_size": 2, "max_response_tokens": 16, "temperature": 0.7},
        "sampling": {"style": "none", "train_batch_prompts": 1},
        "batch": {"mini_batch_prompts": 1},
        "observe": {"tensorboard": False, "plot_at_end": False},
    }
    return Config.model_validate(tree | sections)


@pytest.fixture
def build(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Controller]]:
    made: list[Controller] = []
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps(rows[0]) + "\n")
    monkeypatch.setattr(module, "read_stops", lambda *_: Stops((1,), None, ""))
    monkeypatch.setattr(module, "build_engine", lambda *_, **__: Engine(tokenizer))

    def build(**sections: Any) -> Controller:
        config, hf_config = settings(tmp_path, **sections), Qwen2Config(max_position_embeddings=4096)
        made.append(Controller(config, hf_config, tokenizer, Lines(), PhaseTimer()))
        return made[-1]

    build.folder = tmp_path
    yield build
    for controller in made:
        controller.close()


def test_the_pass_rate_is_the_share_of_right_answers_sampled_as_in_training(build) -> None:
    controller = build()
    assert controller.pass_rate(controller.data.train.prompts, seed=9) == 0.5
    assert controller.engine.calls == [(2, SamplingParams(0.7, 1.0, -1, 16, seed=9))]


def test_a_rollout_step_gives_the_batch_the_row_and_the_position_of_its_step(build) -> None:
    controller = build()
    controller.open_run(None)
    batch = controller.rollout(1)
    assert (batch.num_samples, batch.rewards.tolist()) == (2, [1.0, 1.0])
    assert batch.lengths.tolist() == [4 + len(controller.engine.answer)] * 2
    with controller.timer.phase("train"):
        pass
    controller.record(1, num_updates=3, metrics={"actor/loss": 0.5})
    (row,) = read_metrics(controller.config.run_dir)
    assert (row["step"], row["updates"], row["actor/loss"], row["rollout/made_up"]) == (1, 3.0, 0.5, 1.0)
    flops = 3 * controller.flops.count(batch.lengths, int(batch.num_loss_tokens.sum()))
    assert row["perf/tflops_per_gpu"] * row["time/train_s"] * 1e12 == pytest.approx(flops)
    assert controller.rollout(2).rewards.tolist() == [-1.0, -1.0]
    states = [controller.train_state(step, num_updates=3) for step in (1, 2)]
    assert [(s.step, s.weight_version, s.loader["offset"] + 2 * s.loader["epoch"]) for s in states] == [
        (1, 1, 1),
        (2, 2, 2),
    ]


@pytest.mark.parametrize("reward", [{"overlong": {"filter": True}}, {"filter_void": True}, {}], ids=str)
def test_truncated_or_void_samples_leave_the_loss_as_configured(build, reward) -> None:
    controller = build(reward=reward)
    controller.open_run(None)
    controller.engine.answer = controller.engine.answer[:-1]  # "Answer: ", without an answer
    generate = controller.engine.generate
    controller.engine.generate = lambda *args: [replace(one, finish_reason="length") for one in generate(*args)]
    assert controller.rollout(1).loss_mask.any() == (reward == {})


def test_only_the_samples_to_show_are_kept_once_a_step_has_its_batch(build) -> None:
    controller = build(rollout={"group_size": 4, "max_response_tokens": 16}, observe={"samples_per_step": 1})
    controller.open_run(None)
    made: list[weakref.ref[np.ndarray]] = []

    def generate(prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Rollout]:
        answers = [controller.engine.answer.copy() for _ in prompts]
        made.extend(map(weakref.ref, answers))
        return [Rollout(ids, np.zeros(len(ids), np.float32), np.ones(len(ids), bool), "stop", 0) for ids in answers]

    controller.engine.generate = generate
    controller.rollout(1)
    gc.collect()
    assert [ref() is not None for ref in made] == [True, False, False, False]
    controller.record(1, num_updates=1, metrics={})
    (row,) = read_metrics(controller.config.run_dir)
    assert (row["reward/acc"], row["sampling/samples_generated"]) == (1.0, 4.0)
    (sample,) = (controller.config.run_dir / "samples/step_000001.jsonl").read_text().splitlines()
    assert json.loads(sample)["response"] == "Answer: 2"


def test_an_evaluation_set_has_its_own_sampling_reward_and_all_its_answers_are_kept(build, tmp_path: Path) -> None:
    """Of the set `mixed` the source a is right with `Answer: 2`, and b asks for a box."""
    rows = [{"prompt": f"{n}+1=", "answer": "2", "data_source": source} for n, source in enumerate("aab")]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    own = {"samples_per_prompt": 2, "temperature": 0.0, "max_response_tokens": 32, "reward_function": "by_source"}
    sets = {
        "held": {"files": str(tmp_path / "held.jsonl"), "answer_key": "answer"},
        "mixed": {"files": str(tmp_path / "mixed.jsonl"), "answer_key": "answer", **own},
    }
    controller = build(
        eval={"sets": sets, "samples_per_prompt": 1},
        reward={"by_source": {"a": "math_dapo", "b": "math_boxed"}},
        observe={"eval_samples_per_set": None, "tensorboard": False},
    )
    controller.open_run(None)
    metrics = controller.evaluate(0)
    assert [count for count, _ in controller.engine.calls] == [1, 8]
    assert controller.engine.calls[1][1] == SamplingParams(0.0, 1.0, -1, 32, seed=777)
    means = {name.removeprefix("val/"): value for name, value in metrics.items() if "mean@" in name}
    assert means == {"held/mean@1": 1.0, "mixed/mean@2": 0.75, "mixed/a/mean@2": 1.0, "mixed/b/mean@2": 0.0}
    lines = (controller.config.run_dir / "samples/eval/step_000000.jsonl").read_text().splitlines()
    assert sorted((row["set"], row["source"]) for row in map(json.loads, lines)) == [
        *[("held", "")],
        *[("mixed", "a")] * 6,
        *[("mixed", "b")] * 2,
    ]
    assert (
        "eval.sets.mixed: 4 rows gave 4 prompts (1 repeats of an earlier row, which stay)" in controller.progress.lines
    )


def test_a_first_step_without_a_right_answer_tells_why(build) -> None:
    controller = build(data={"files": str(build.folder / "train.jsonl"), "answer_key": "prompt", "shuffle": False})
    controller.open_run(None)
    controller.rollout(1)
    (told,) = [line for line in controller.progress.lines if line.startswith("warning: none of the 2 responses")]
    assert told.endswith("--function math_dapo --answer 1+1= --text $'Answer: 2'")
    controller.rollout(2)
    assert len([line for line in controller.progress.lines if "none of the" in line]) == 1


def test_a_new_run_moves_an_earlier_one_aside_but_not_its_own_lock_logs_and_servers(build) -> None:
    controller = build()
    run_dir = controller.config.run_dir
    for name in ("samples", "servers", "logs"):
        (run_dir / name).mkdir(parents=True)
    for name in ("metrics.jsonl", ".lock"):
        (run_dir / name).write_text("{}\n")
    controller.open_run(None)
    aside = run_dir.with_name("run.old1")
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "samples"]
    assert {".lock", "logs", "servers"} <= {path.name for path in run_dir.iterdir()}
    assert f"an earlier run without a checkpoint to resume was moved to {aside}" in controller.progress.lines


def test_a_rollout_that_is_not_trained_on_is_in_the_checkpoint_if_asked(build) -> None:
    controller = build(checkpoint={"keep_rollouts": True})
    controller.open_run(None)
    controller.rollout(1)
    before, after = controller.train_state(0, num_updates=0), controller.train_state(1, num_updates=1)
    assert (before.loader, before.sampler["again"]) == (after.loader, [])
    uids = [prompt.uid for prompt in controller.data.train.prompts]
    assert [group["uid"] for group in before.sampler["groups"]] == uids[:1] and after.sampler["groups"] == []
    controller.engine.generate = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        controller.rollout(2)
    interrupted = controller.train_state(1, num_updates=1)
    assert interrupted.sampler == {"groups": [], "again": uids[1:]}


def test_an_evaluation_that_a_signal_prevented_is_made_up_once(build) -> None:
    controller = build()
    controller.open_run(None)
    controller.sinks.write(1, {"a": 1.0})
    controller.make_up_evaluation(1)
    controller.make_up_evaluation(1)
    (row,) = read_metrics(controller.config.run_dir)
    assert (row["a"], row["val/held/mean@1"]) == (1.0, 1.0)
    assert len(controller.engine.calls) == 1
