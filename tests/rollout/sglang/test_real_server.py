"""The engine on two real SGLang servers: log-probs, weight syncs by disk and by broadcast, and kill -9 at the worst moments.

One start for all tests, which run in order. It needs the environment that tools/sglang_cpu/setup.sh makes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import UpdateBroken
from dapo_mcore.model_files.hf_config import load_hf_config
from dapo_mcore.rollout.agent.engine import ContinuousToolEngine
from dapo_mcore.rollout.agent.episode import Dialect
from dapo_mcore.rollout.embedded import EmbeddedEngine
from dapo_mcore.rollout.sglang.engine import SGLangEngine
from dapo_mcore.rollout.sglang.pool.server import Server
from dapo_mcore.rollout.sglang.sync.distributed import DistributedSender
from dapo_mcore.types import SamplingParams
from tests.rollout.agent.letters import Angles, FiveTokens, spoken
from tests.rollout.agent.talk import Kind, Result, StubTools, runs_of
from tests.rollout.sglang.asserts import assert_follows, mismatch, mismatch_with
from tests.rollout.sglang.serving import (
    CONTEXT,
    STOP,
    bucket_a_tensor,
    engine,
    generate_and_sync_again,
    params,
    prompts,
    real_python,
    servers,
    sync_by,
    tiny_config,
    tiny_model,
    wait_for,
    weights,
)

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[SGLangEngine]:
    folder = tmp_path_factory.mktemp("real")
    patience = dict(health_interval_s=5.0, health_timeout_s=30.0, sync_timeout_s=60.0)
    with engine(folder, python=real_python(), num_servers=2, restart_budget=9, **patience) as started:
        yield started


def sync(made: SGLangEngine, seed: int) -> None:
    made.update_weights(weights(seed), made.weight_version + 1)


def assert_in_one_group(made: SGLangEngine) -> None:
    first, second = made.pool.servers
    assert first.broadcast_group is second.broadcast_group is not None and len(first.broadcast_group.servers) == 2


def both_serve(made: SGLangEngine) -> None:
    wait_for(lambda: len(made.pool.serving) == 2, 240, made.pool.states.describe)


@contextmanager
def killing(server: Server, call: str, at: int = 1) -> Iterator[None]:
    """Kill the server (SIGKILL) as the `at`-th `call` is sent to it."""
    real, calls = getattr(server.client, call), []

    async def wrapped(*arguments, **named):
        calls.append(call)
        if len(calls) == at:
            os.killpg(server.process.pid, signal.SIGKILL)
        return await real(*arguments, **named)

    setattr(server.client, call, wrapped)
    try:
        yield
    finally:
        delattr(server.client, call)
    assert len(calls) >= at


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_trained_model_after_temperature(made, temperature):
    sync(made, seed=0)
    asked = prompts(24)
    rollouts = made.generate(asked, params(24, temperature))
    assert mismatch(rollouts, asked, 0, temperature) <= 1e-5
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert all(rollout.token_ids[-1] == STOP and STOP not in rollout.token_ids[:-1] for rollout in stopped)
    full = [rollout for rollout in rollouts if rollout.finish_reason == "length"]
    assert all(len(rollout.token_ids) == 24 and STOP not in rollout.token_ids for rollout in full)
    assert stopped and full


@pytest.mark.slow
def test_a_server_has_the_overrides_of_config_json(tmp_path):
    """Prompts of 600 tokens, above the stored limit of 512, with the angles of YaRN as Hugging Face computes them."""
    tiny_config().save_pretrained(tmp_path / "model")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}
    overrides = {"max_position_embeddings": 4 * CONTEXT, "rope_scaling": yarn}
    config = load_hf_config(ModelConfig(path=str(tmp_path / "model"), overrides=overrides))
    scaled = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    scaled.load_state_dict(tiny_model(0).state_dict())
    asked = [np.arange(600 + i, dtype=np.int32) % 60 + 3 for i in range(4)]
    with engine(tmp_path, python=real_python(), config=config, sync_timeout_s=60.0) as alone:
        alone.update_weights(weights(0), 1)
        rollouts = alone.generate(asked, params(24))
    with torch.no_grad():
        assert mismatch_with(scaled, rollouts, asked) <= 2e-5
        plain = AutoModelForCausalLM.from_config(tiny_config(max_position_embeddings=2048), attn_implementation="eager")
        plain.load_state_dict(tiny_model(0).state_dict())
        assert mismatch_with(plain, rollouts, asked) > 1e-3


def test_greedy_responses_equal_those_of_the_embedded_engine(made):
    """As in an evaluation: the same tokens, with the log-probs of temperature 1."""
    embedded = EmbeddedEngine(tiny_config(), stop_token_ids=(STOP,), pad_token_id=0, max_batch=32, num_threads=1)
    embedded.update_weights(weights(0), version=0)
    greedy = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, max_new_tokens=24, seed=0)
    asked = prompts(16)
    for ours, theirs in zip(made.generate(asked, greedy), embedded.generate(asked, greedy), strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist() and ours.finish_reason == theirs.finish_reason
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def test_servers_generate_with_the_weights_of_a_sync_from_disk(made):
    sync(made, seed=2)
    assert_follows(made, seed=2)


def test_turns_of_a_response_with_tools_have_the_logprobs_of_the_whole_sequence(made):
    """A turn's server computes the tool's output as a prompt, and stops where a call may end."""
    tools = StubTools(lambda name, arguments: Result(Kind.OK, "\x05"))
    answers = ContinuousToolEngine(made, tools, Dialect(FiveTokens(), Angles(), spoken, frozenset(), max_turns=3))
    asked = prompts(16)
    rollouts = answers.generate(asked, params(24))
    answers.stop()
    assert mismatch(rollouts, asked, 2) <= 1e-5
    longest = max(rollouts, key=lambda rollout: rollout.num_turns)
    assert longest.num_turns > 1 and len(longest.calls) == longest.num_turns - 1
    assert list(runs_of(longest.loss_mask))[:2] == [(True, 5), (False, 3)]
    assert not longest.logprobs[~longest.loss_mask].any() and answers.metrics()["rollout/tokens_cut"] > 0


def test_aborted_requests_are_sent_again(made):
    asked = prompts(32)
    future = made.submit(asked, params(300))
    num_aborted = 0.0
    while not (num_aborted or future.done()):  # an abort that comes before the requests ends none
        servers(made)[0].post("/abort_request", {"rid": "", "abort_all": True})
        num_aborted += made.metrics()["rollout/dropped_aborted"]
    rollouts = future.result()
    assert mismatch(rollouts, asked, seed=2) <= 1e-5
    assert num_aborted > 0
    assert {rollout.finish_reason for rollout in rollouts} <= {"stop", "length"}


def test_kill_9_during_generation_loses_no_sample(made):
    asked = prompts(48)
    with killing(made.pool.servers[0], "generate", at=20):
        rollouts = made.generate(asked, params(64))
    assert mismatch(rollouts, asked, seed=2) <= 1e-5
    numbers = made.metrics()
    assert numbers["rollout/retries"] > 0 and numbers["rollout/servers_suspected"] == 1
    both_serve(made)
    assert made.metrics()["rollout/server_restarts"] + numbers["rollout/server_restarts"] == 1
    assert_follows(made, seed=2)


def test_kill_9_during_a_sync_from_disk_costs_one_server_until_it_has_the_weights_again(made):
    with killing(made.pool.servers[1], "update_weights_from_disk"):
        sync(made, seed=4)
    assert made.pool.servers[0].state == "serving" and made.pool.servers[1].state in ("out", "down")
    assert_follows(made, seed=4)
    both_serve(made)
    assert_follows(made, seed=4)


def test_servers_generate_with_the_weights_of_one_broadcast_to_both(made):
    sync_by(made, DistributedSender("127.0.0.1", "gloo", timeout_s=60))
    sync(made, seed=6)
    assert_follows(made, seed=6)
    bucket_a_tensor(made)
    sync(made, seed=8)
    assert_follows(made, seed=8)
    assert_in_one_group(made)
    print({name: value for name, value in made.metrics().items() if name.startswith("sync/")})


def test_kill_9_during_a_broadcast_breaks_it_and_the_restarted_server_joins_the_next(made):
    before = made.weight_version
    with (
        killing(made.pool.servers[0], "update_weights_from_distributed", at=5),
        pytest.raises(UpdateBroken, match="only without the weights: 1 "),
    ):
        sync(made, seed=10)
    assert made.weight_version == before and not made.pool.serving
    sync(made, seed=10)  # all ranks send it again
    assert made.pool.servers[1].state == "serving" and made.pool.servers[0].state != "serving"
    assert_follows(made, seed=10)
    assert made.metrics()["sync/repeats"] == 1
    wait_for(lambda: made.pool.servers[0].state == "waiting", 240)
    sync(made, seed=12)
    both_serve(made)
    assert_follows(made, seed=12)
    assert_in_one_group(made)


def test_kill_9_of_all_servers_during_generation_waits_for_the_weights(made):
    """The next test needs both servers as this one leaves them."""
    asked = prompts(48)
    with killing(made.pool.servers[0], "generate", at=20), killing(made.pool.servers[1], "generate", at=20):
        rollouts = generate_and_sync_again(made, asked, params(64), lambda: sync(made, seed=12))
    assert mismatch(rollouts, asked, seed=12) <= 1e-5
    wait_for(lambda: all(server.state in ("serving", "waiting") for server in made.pool.servers), 240)
    sync(made, seed=12)
    both_serve(made)


def test_kill_9_of_a_server_in_its_own_group_needs_no_repeat(made):
    sync_by(made, DistributedSender("127.0.0.1", "gloo", timeout_s=60, servers_per_group=1))
    with killing(made.pool.servers[0], "update_weights_from_distributed", at=5):
        sync(made, seed=14)
    assert made.pool.servers[1].state == "serving" and made.pool.servers[0].state != "serving"
    assert_follows(made, seed=14)
