from __future__ import annotations

import json

import numpy as np

from dapo_mcore.rollout.sampling.carry import pack_groups, unpack_groups
from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score, ToolCall


def test_version_spans_seeds_and_calls_survive_a_restart():
    prompt = Prompt("train:0", np.array([1, 2], np.int32), "1+1=", "2")
    rollout = Rollout(
        token_ids=np.array([5, 6, 7, 8], np.int32),
        logprobs=np.array([-1.0, 0.0, -2.0, -3.0], np.float32),
        loss_mask=np.array([True, False, True, True]),
        finish_reason="stop",
        weight_version=3,
        version_spans=((0, 3), (2, 4)),
        seed=2**63 - 1,
        num_turns=2,
        calls=(ToolCall("python", '{"code": "\u00e9"}', "timeout", "no answer in 3 s", 3.5),),
    )
    state, arrays = pack_groups([Group(prompt, (Sample(rollout, "2", Score(1.0, 1.0, True)),))])
    (group,) = unpack_groups(json.loads(json.dumps(state)), arrays, {"train:0": prompt})
    (sample,) = group.samples
    assert sample.rollout.version_spans == ((0, 3), (2, 4)) and group.weight_version == 3
    assert sample.rollout.seed == 2**63 - 1
    assert sample.rollout.num_turns == 2 and sample.rollout.calls == rollout.calls
    for name in ("token_ids", "logprobs", "loss_mask"):
        found, kept = getattr(sample.rollout, name), getattr(rollout, name)
        assert found.dtype == kept.dtype and np.array_equal(found, kept), name


def test_groups_of_earlier_versions_have_one_turn_and_no_calls():
    prompt = Prompt("train:0", np.array([1, 2], np.int32), "1+1=", "2")
    rollout = Rollout(np.array([5], np.int32), np.zeros(1, np.float32), np.ones(1, bool), "stop", 3)
    state, arrays = pack_groups([Group(prompt, (Sample(rollout, "2", Score(1.0, 1.0, True)),))])
    for name in ("seed", "num_turns", "calls"):
        del state["groups"][0]["samples"][0][name]
    (group,) = unpack_groups(state, arrays, {"train:0": prompt})
    (sample,) = group.samples
    assert (sample.rollout.seed, sample.rollout.num_turns, sample.rollout.calls) == (None, 1, ())
