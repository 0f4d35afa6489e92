"""The weight stream of a policy on four processes (TP2·PP2, interleaved) gives back what the policy was loaded from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dapo_mcore.actor.weight_stream import WeightStream, leading_ranks
from dapo_mcore.errors import RolloutError, UpdateBroken
from dapo_mcore.handover import sync_weights
from dapo_mcore.process.beacon import NullBeacon
from tests.actor import families
from tests.actor.parity import Mesh, build_actor, hf_config, make_config, model64, spawn, start_weights

PROMPTS = [np.array([1, 2, 3], dtype=np.int32), np.array([4], dtype=np.int32)]


def stream_and_sync(layout: Any, mesh: Mesh) -> dict[str, Any]:
    return {str(tied): one_policy(layout, mesh, tied) for tied in (False, True)}


def one_policy(layout: Any, mesh: Mesh, tied: bool) -> dict[str, Any]:
    from dapo_mcore.rollout.embedded import EmbeddedEngine

    actor = build_actor(make_config(mesh), layout, tied=tied)
    stream = WeightStream(actor.policy, actor.shape, layout)
    streamed = [(name, tensor.clone()) for name, tensor in stream()]
    counts: list[Any] = [None] * layout.world_size
    torch.distributed.all_gather_object(counts, len(streamed), group=layout.control_group)
    engine = None
    if layout.is_controller:
        stop = (0,)
        engine = EmbeddedEngine(
            hf_config("qwen2", tied), stop_token_ids=stop, pad_token_id=0, max_batch=4, num_threads=1
        )
    sync_weights(stream, engine, version=7)
    if engine is None:
        return {}
    expected = start_weights("qwen2", tied)
    if tied:
        expected.pop("lm_head.weight")
    found = dict(streamed)
    return {
        "counts": counts,
        "names": sorted(name for name, _ in streamed) == sorted(expected),
        "different": [name for name in expected if not torch.equal(found[name], expected[name])],
        "version": engine.weight_version,
        "logprobs": logprob_error(engine, tied),
    }


class BreakingEngine:
    """Fails the given number of times; the weights of every try."""

    def __init__(self, problem: Exception, times: int):
        self.problem, self.times_left, self.tries = problem, times, []

    def update_weights(self, weights: Any, version: int) -> None:
        self.tries.append({name: float(tensor.sum()) for name, tensor in weights})
        self.times_left -= 1
        if self.times_left >= 0:
            raise self.problem


def broken_syncs(layout: Any, mesh: Mesh) -> dict[str, Any]:
    """Of engines that fail: (tries, whether each brought the same weights, the error at the end)."""
    actor = build_actor(make_config(mesh), layout)
    stream = WeightStream(actor.policy, actor.shape, layout)
    cases = {
        "once": BreakingEngine(UpdateBroken("one died"), 1),
        "for ever": BreakingEngine(UpdateBroken("one died"), 99),
        "otherwise": BreakingEngine(RolloutError("no fit"), 1),
    }
    found = {}
    for name, engine in cases.items():
        told = ""
        try:
            sync_weights(stream, engine if layout.is_controller else None, version=3)
        except RolloutError as error:
            told = str(error)
        layout.barrier()  # every rank has come out of it
        found[name] = [len(engine.tries), all(tried == engine.tries[0] for tried in engine.tries), told]
    return found


def test_a_sync_that_breaks_off_is_repeated_on_every_rank_and_only_so_often() -> None:
    found = spawn(broken_syncs, Mesh(tensor=2))
    assert found == {"once": [2, True, ""], "for ever": [3, True, "one died"], "otherwise": [1, True, "no fit"]}


def logprob_error(engine: Any, tied: bool) -> float:
    """The largest difference between the engine's log-probs and those of Hugging Face's model in fp64."""
    from dapo_mcore.types import SamplingParams

    rollouts = engine.generate(PROMPTS, SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=6, seed=1))
    model = model64("qwen2", tied)
    errors = []
    for prompt, rollout in zip(PROMPTS, rollouts):
        tokens = torch.from_numpy(np.concatenate([prompt, rollout.token_ids]).astype(np.int64))
        with torch.no_grad():
            logp = model(tokens[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, tokens[len(prompt) :, None])[:, 0]
        errors.append((torch.from_numpy(rollout.logprobs) - expected).abs().max().item())
    return max(errors)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return spawn(stream_and_sync, Mesh(tensor=2, pipeline=2, virtual=2))


@pytest.mark.parametrize(("tied", "count"), [("False", 4 * 12 + 3), ("True", 4 * 12 + 2)])
def test_the_stream_is_bitwise_what_the_policy_was_loaded_from(result: dict[str, Any], tied: str, count: int) -> None:
    found = result[tied]
    assert found["names"]
    assert found["different"] == []
    assert found["counts"] == [count, 0, 0, 0]


@pytest.mark.parametrize("tied", ["False", "True"])
def test_the_engine_takes_the_stream_and_agrees_with_hugging_face(result: dict[str, Any], tied: str) -> None:
    assert result[tied]["version"] == 7
    assert result[tied]["logprobs"] < 2e-5


def stream_of_experts(layout: Any, mesh: Mesh, paths: list[str]) -> list[Any]:
    """Of each problem, the names whose streamed tensors are not bitwise those on disk; on rank 0."""
    from dapo_mcore.actor.model.policy import build_policy
    from dapo_mcore.architecture.shape import weight_shape

    found = []
    for problem in map(families.load_problem, paths):
        policy = build_policy(make_config(mesh), problem.hf_config, layout)
        families.fill(policy, problem, layout)
        stream = WeightStream(policy, weight_shape(problem.hf_config, layout.tensor), layout)
        streamed = dict(stream())
        if layout.is_controller:
            assert streamed.keys() == problem.weights.keys()
            found.append([name for name in streamed if not torch.equal(streamed[name], problem.weights[name])])
        else:
            assert not streamed
        for most in (2, 4):
            assert_parts_make_up_the_model(stream, leading_ranks(layout, most), problem.weights)
    return found


def assert_parts_make_up_the_model(stream: WeightStream, leaders: tuple[int, ...], weights: Any) -> None:
    part = list(stream(leaders=leaders))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in part)
    names: list[Any] = [None] * stream.layout.world_size
    torch.distributed.all_gather_object(names, [name for name, _ in part], group=stream.layout.control_group)
    assert sorted(name for part in names for name in part) == sorted(weights), "each tensor once"
    assert tuple(rank for rank, part in enumerate(names) if part) == leaders, "a leader has something to send"


@pytest.mark.parametrize(
    ("world_size", "pipeline", "most", "expected"),
    [
        (8, 1, 4, (0,)),
        (16, 2, 4, (0, 8)),
        (16, 2, 1, (0,)),
        (12, 3, 9, (0, 4, 8)),
        (128, 4, 4, (0, 32, 64, 96)),
        (6, 6, 4, (0, 1, 3, 4)),
    ],
)
def test_leaders_are_the_first_ranks_of_stages_and_neighbours_share_one(world_size, pipeline, most, expected) -> None:
    assert leading_ranks(SimpleNamespace(world_size=world_size, pipeline=pipeline), most) == expected


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    names = ("mixtral", "qwen2-moe", "deepseek-v3")
    return [str(families.save_problem(name, tmp_path_factory.mktemp("family"))) for name in names]


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(data=2, expert=2),
        Mesh(tensor=2, data=2, sequence_parallel=True, expert=2, expert_tensor=2),
        Mesh(context=2, pipeline=2, expert=2),
    ],
    ids=str,
)
def test_experts_of_every_rank_are_in_the_stream(mesh: Mesh, problems: list[str]) -> None:
    assert spawn(stream_of_experts, mesh, problems) == [[], [], []]


@pytest.mark.parametrize(("device", "most"), [("cuda", 1), ("cpu", 2)])
def test_a_gpu_has_sent_a_message_before_the_next_is_queued(monkeypatch, device, most):
    """A bucket that comes to this rank from rank 0 would wait behind it on the GPU."""
    queued: list[Any] = []

    class Message:
        def __init__(self) -> None:
            self.looks, self.waited = 2, False
            queued.append(self)
            assert sum(not message.waited for message in queued) <= most

        def is_completed(self) -> bool:
            self.looks -= 1
            return self.looks == 0

        def wait(self) -> None:
            assert device == "cpu" or self.looks == 0, "NCCL's wait returns before the message is sent"
            self.waited = True

    monkeypatch.setattr("torch.distributed.isend", lambda message, rank: Message())
    stream = WeightStream.__new__(WeightStream)
    stream.layout = SimpleNamespace(rank=3, is_controller=False, device=torch.device(device), beacon=NullBeacon())
    stream.local = {"a": torch.ones(2)}
    stream.plan = [(SimpleNamespace(name="a", holders=holders),) for holders in ((3,), (3,), (1,), (3,), (3,))]
    assert list(stream()) == []
    assert len(queued) == 4 and all(message.waited for message in queued)
