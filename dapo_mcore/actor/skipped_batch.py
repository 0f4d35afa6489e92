"""Writes the mini-batch of a skipped gradient step, to study it.

Change here: what is written of a skipped step, and how many of them are kept.

    run_dir/skipped/update_000123/
        skip.json                what was not finite first, the norms, and the mini-batch's samples with prompt uid and reward
        rank_00003.safetensors   of each rank that computes losses: its samples as in types.TrainBatch, and its loss tokens

`samples` gives the samples' numbers within the rollout step. The arrays `token_…` [L] have one entry for each loss token that
the rank computes, in the order of its micro-batches.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from dapo_mcore.actor.forward_backward import MicroBatchOutput
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.actor.scatter import MiniBatchPlan, ScatteredStep
from dapo_mcore.batch.collate import select
from dapo_mcore.types import MicroBatch, TrainBatch

SKIPPED = "skipped"
"""Folder of a run."""
KEPT_FIRST, KEPT_NEWEST = 3, 2
_TOKEN_FIELDS = (
    "sample_ids", "targets", "advantages", "token_weights", "rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "returns",
    "tis_weights", "policy_mask", "old_kl_coefs",
)  # fmt: skip


@dataclass(frozen=True)
class SkippedBatch:
    """The mini-batch of a skipped step on one rank. `outputs` is empty on ranks before the last stage."""

    step: ScatteredStep
    plan: MiniBatchPlan
    micro_batches: Sequence[MicroBatch]
    outputs: Sequence[MicroBatchOutput]

    def arrays(self, layout: Layout) -> dict[str, np.ndarray]:
        """Return what this rank writes of it. Context-parallel ranks share samples, so only the first of them writes these."""
        if layout.context_rank:
            return self._tokens()
        own = [sample for part in self.plan.micro[layout.data_rank] for sample in part]
        batch = select(self.step.batch, [self.step.local_of[sample] for sample in own])
        found = {field.name: getattr(batch, field.name) for field in fields(TrainBatch)}
        return found | {"samples": np.array(own, np.int64)} | self._tokens()

    def samples(self, uids: Sequence[str]) -> list[dict[str, Any]]:
        """Return the mini-batch's samples on all ranks, for people. uids [P] are those of the groups' prompts."""
        known = self.step.metadata
        return [
            {
                "sample": sample,
                "group": (group := int(known.group_ids[sample])),
                "uid": uids[group] if group < len(uids) else None,
                "reward": _as_json(known.rewards[sample]),
                "length": int(known.lengths[sample]),
                "num_loss_tokens": int(known.num_loss_tokens[sample]),
                "in_statistics": bool(known.in_statistics[sample]),
            }
            for sample in self.plan.samples.tolist()
        ]

    def _tokens(self) -> dict[str, np.ndarray]:
        numbers = [np.full(len(micro.rows), number) for number, micro in enumerate(self.micro_batches)]
        found = {"token_micro_batches": np.concatenate(numbers)}
        for name in _TOKEN_FIELDS:
            values = [getattr(micro, name) for micro in self.micro_batches]
            if all(value is not None for value in values):
                found[f"token_{name}"] = np.concatenate([value.cpu().numpy() for value in values])
        logprobs = [output["logprobs"].detach().cpu().numpy() for output in self.outputs]
        return found | ({"token_logprobs": np.concatenate(logprobs)} if logprobs else {})


def write_skipped(folder: Path, batch: SkippedBatch, facts: Mapping[str, Any], layout: Layout) -> str:
    """Write the batch to `folder`, and return what to tell of it, on rank 0. A refused write is told and never raised.

    Deletes the folders beside it but for the first 3 and the newest. Each rank that computes losses writes its own part, so no
    rank's memory holds the whole mini-batch. Collectives: a gloo broadcast and a gloo gather.
    """
    problem = layout.broadcast_object(_tried(lambda: _begin(folder)) if layout.is_controller else None)
    if problem is None and layout.reports_loss:
        problem = _tried(lambda: _write_own(folder, batch, layout))
    problems = [told for told in layout.gather_objects(problem) if told]
    if layout.is_controller and not problems:
        text = json.dumps({name: _as_json(value) for name, value in facts.items()}, indent=1)
        problems = [told for told in [_tried(lambda: (folder / "skip.json").write_text(text))] if told]
    return f"its batch could not be written to {folder}: {problems[0]}" if problems else f"its batch is in {folder}"


def _begin(folder: Path) -> None:
    """Make the folder, and delete those that are neither among the first nor among the newest."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    others = sorted(path for path in folder.parent.iterdir() if path.name != folder.name)
    for path in others[KEPT_FIRST : len(others) - KEPT_NEWEST + 1]:
        shutil.rmtree(path)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that has been resumed before it
    folder.mkdir()


def _write_own(folder: Path, batch: SkippedBatch, layout: Layout) -> None:
    folder.mkdir(exist_ok=True)  # a network disk may show another machine's folder later
    content = safetensors.numpy.save(batch.arrays(layout))
    (folder / f"rank_{layout.rank:05d}.safetensors").write_bytes(content)


def _tried(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _as_json(value: Any) -> Any:
    """Return a number that strict JSON has, or the name of one that it does not have (`nan`, `inf`)."""
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value
