"""Groups as JSON and flat arrays and back, so that carried groups survive a restart.

Change here: the stored form of a group. A prompt is stored by its uid, which depends on its content alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dapo_mcore.types import Group, Prompt, Rollout, Sample, Score, ToolCall


def pack_groups(groups: Sequence[Group]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a JSON-ready description of the groups, and arrays with their tokens.

    Arrays: token_ids int32 [T], logprobs float32 [T], loss_mask bool [T] of all samples concatenated, and offsets
    int64 [B+1]. `unpack_groups` restores the groups exactly.
    """
    rollouts = [sample.rollout for group in groups for sample in group.samples]
    arrays = {
        "token_ids": _concatenate([r.token_ids for r in rollouts], np.int32),
        "logprobs": _concatenate([r.logprobs for r in rollouts], np.float32),
        "loss_mask": _concatenate([r.loss_mask for r in rollouts], np.bool_),
        "offsets": np.cumsum([0, *(len(r.token_ids) for r in rollouts)], dtype=np.int64),
    }
    return {"groups": [_describe(group) for group in groups]}, arrays


def unpack_groups(state: dict[str, Any], arrays: dict[str, np.ndarray], prompts: Mapping[str, Prompt]) -> list[Group]:
    """Return the groups that `pack_groups` stored, without those whose prompt uid is no longer in `prompts`."""
    spans = zip(arrays["offsets"][:-1].tolist(), arrays["offsets"][1:].tolist())
    stored = [
        (described["uid"], tuple(_restore(sample, arrays, *next(spans)) for sample in described["samples"]))
        for described in state["groups"]
    ]
    return [Group(prompts[uid], samples) for uid, samples in stored if uid in prompts]


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _describe(group: Group) -> dict[str, Any]:
    return {
        "uid": group.prompt.uid,
        "samples": [
            {
                "text": sample.text,
                "score": asdict(sample.score),
                "finish_reason": sample.rollout.finish_reason,
                "weight_version": sample.rollout.weight_version,
                "version_spans": sample.rollout.version_spans,
                "seed": sample.rollout.seed,
                "num_turns": sample.rollout.num_turns,
                "calls": [asdict(call) for call in sample.rollout.calls],
            }
            for sample in group.samples
        ],
    }


def _restore(described: dict[str, Any], arrays: dict[str, np.ndarray], start: int, end: int) -> Sample:
    rollout = Rollout(
        token_ids=arrays["token_ids"][start:end].copy(),
        logprobs=arrays["logprobs"][start:end].copy(),
        loss_mask=arrays["loss_mask"][start:end].copy(),
        finish_reason=described["finish_reason"],
        weight_version=described["weight_version"],
        version_spans=tuple((start, version) for start, version in described["version_spans"]),
        # checkpoints of earlier versions lack these
        seed=described.get("seed"),
        num_turns=described.get("num_turns", 1),
        calls=tuple(ToolCall(**call) for call in described.get("calls", ())),
    )
    return Sample(rollout, described["text"], Score(**described["score"]))
