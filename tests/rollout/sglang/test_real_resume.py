"""Requests that continue after weight updates on a real server: each token comes from the weights that its span names, given all
tokens before it, so no KV cache of older weights is left. The same server then takes weights through shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import numpy as np
import pytest
import torch

from dapo_mcore.errors import ConfigError
from dapo_mcore.rollout.sglang.client.versions import FIRST_WITH_CONTINUED_REQUESTS
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.sync.delta import DeltaSender
from dapo_mcore.rollout.sglang.sync.disk import DiskSender
from dapo_mcore.rollout.sglang.sync.distributed import DistributedSender
from dapo_mcore.rollout.sglang.sync.tensor import TensorSender
from dapo_mcore.types import Rollout
from tests.rollout.sglang.asserts import assert_an_error_where_memory_cannot_be_opened, assert_follows
from tests.rollout.sglang.serving import (
    bucket_a_tensor,
    engine,
    gathered,
    params,
    prompts,
    real_python,
    real_version,
    shared_files,
    sync_by,
    tiny_model,
    weights,
)

PATIENCE = dict(health_interval_s=5.0, health_timeout_s=30.0, sync_timeout_s=60.0)
pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[SGLangEngine]:
    if real_version() < FIRST_WITH_CONTINUED_REQUESTS:
        pytest.skip("this version is refused, as the first test shows")
    takes_changes = dict(sync="tensor", delta=True)
    with engine(
        tmp_path_factory.mktemp("real"), python=real_python(), max_lag=2, restart_budget=0, **takes_changes, **PATIENCE
    ) as started:
        yield started


def test_a_version_whose_requests_end_at_an_update_is_refused(tmp_path):
    if real_version() >= FIRST_WITH_CONTINUED_REQUESTS:
        pytest.skip("this version has it, as the other tests show")
    refused = pytest.raises(
        ConfigError, match=r"on_full keep needs 0\.5\.21 or newer: update SGLang, or set on_full wait"
    )
    with refused, engine(tmp_path, python=real_python(), max_lag=2, **PATIENCE):
        pass


def reference(prompt: np.ndarray, rollout: Rollout, seed: int) -> torch.Tensor:
    """Return float64 [T]: log-probs of the response's tokens by Hugging Face's model."""
    ids = torch.from_numpy(np.concatenate([prompt, rollout.token_ids])).long()
    logits = tiny_model(seed).double()(ids[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]


WAYS = {
    "disk": lambda folder: DiskSender(folder / "weights", num_bytes=1 << 20),
    "distributed": lambda folder: DistributedSender("127.0.0.1", "gloo", timeout_s=60),
    "tensor": lambda folder: TensorSender([], bucket_bytes=1 << 19),
}


@pytest.mark.parametrize("sync", ["disk", "distributed", "tensor"])
def test_each_token_comes_from_the_weights_that_its_span_names(made, sync, tmp_path):
    sync_by(made, WAYS[sync](tmp_path))
    first = made.weight_version + 1
    made.update_weights(weights(seed=first), first)
    asked = prompts(64)  # most responses stop early
    future = made.submit(asked, params(300))
    for version in (first + 1, first + 2):
        made.generate(prompts(1), params(16))  # comes after the others, so each of them has tokens when this is done
        made.update_weights(weights(seed=version), version)
    rollouts = future.result()
    by_versions = {n: sum(len(r.version_spans) == n for r in rollouts) for n in (0, 2, 3)}
    print(f"{sync}: responses by number of spans {by_versions}")
    assert by_versions[3] >= 3, by_versions
    worst, wrong = 0.0, []
    for prompt, rollout in zip(asked, rollouts, strict=True):
        spans = rollout.version_spans or ((0, rollout.weight_version),)
        assert [version for _, version in spans] == list(range(spans[0][1], spans[-1][1] + 1))
        assert rollout.weight_version == spans[0][1] and rollout.finish_reason in ("stop", "length")
        ends = [*(start for start, _ in spans[1:]), len(rollout.token_ids)]
        told = torch.from_numpy(rollout.logprobs)
        for (start, version), end in zip(spans, ends):
            worst = max(worst, (told - reference(prompt, rollout, version))[start:end].abs().max().item())
        if len(spans) == 3:  # the last span does not come from the first weights
            others = (told - reference(prompt, rollout, first))[ends[1] :].abs().max().item()
            wrong.append(others)
    assert worst <= 1e-5 and median(wrong) > 0.01, wrong  # a span of a few tokens may be near by chance
    assert all(count == 0 for name, count in made.metrics().items() if "dropped" in name or "retries" in name)


def test_new_requests_come_from_the_newest_weights_alone(made):
    pending = made.submit(prompts(8), params(300))
    version = made.weight_version + 1
    made.update_weights(weights(seed=version), version)
    asked = prompts(8)
    for prompt, rollout in zip(asked, made.generate(asked, params(24))):
        assert rollout.weight_version == version and rollout.version_spans == ()
        distance = torch.from_numpy(rollout.logprobs) - reference(prompt, rollout, version)
        assert distance.abs().max() <= 1e-5
    assert {rollout.weight_version for rollout in pending.result()} <= {version - 1, version}


@pytest.mark.parametrize("sync", ["distributed", "tensor"])
def test_three_updates_by_changes_leave_the_weights_of_a_whole_sync(made, sync, tmp_path):
    """The server's own sums of bits have agreed by then. Its log-probs are those of a whole sync, bit by bit."""
    torch.manual_seed(0)
    sync_by(made, DeltaSender(WAYS[sync](tmp_path), bucket_bytes=1 << 19))
    model = tiny_model(made.weight_version + 1)
    for number in range(4):
        made.update_weights(iter(list(model.named_parameters())), made.weight_version + 1)
        assert ("sync/delta_bytes" in made.metrics()) == (number > 0)
        if number < 3:
            for parameter in model.parameters():
                where = torch.rand(parameter.shape) < 0.02
                parameter.data = torch.where(where, torch.randn(parameter.shape) * 0.3, parameter)
    after_changes = greedy(made)
    sync_by(made, WAYS[sync](tmp_path))
    made.update_weights(iter(list(model.named_parameters())), made.weight_version + 1)
    assert greedy(made) == after_changes
    made.update_weights(weights(seed=1), made.weight_version + 1)
    assert greedy(made) != after_changes, "the comparison can fail"


def greedy(made: SGLangEngine) -> list[tuple[list[int], list[float]]]:
    """Return tokens and log-probs of some prompts, generated one at a time, so that no batch changes their rounding."""
    found = [made.generate([prompt], params(16, temperature=0.0))[0] for prompt in prompts(4)]
    return [(rollout.token_ids.tolist(), rollout.logprobs.tolist()) for rollout in found]


def test_buckets_of_one_tensor_through_shared_memory_leave_nothing_behind(made):
    sync_by(made, WAYS["tensor"](None))
    version = made.weight_version + 1
    bucket_a_tensor(made)
    made.update_weights(weights(seed=version), version)
    assert_follows(made, seed=version)
    made.update_weights(gathered(made, seed=version + 2), version + 1)
    assert_follows(made, seed=version + 2)
    assert shared_files() == []
    print({name: value for name, value in made.metrics().items() if name.startswith("sync/")})


def test_last_the_server_ends_if_it_cannot_open_the_memory(made, monkeypatch):
    assert_an_error_where_memory_cannot_be_opened(made, monkeypatch)
