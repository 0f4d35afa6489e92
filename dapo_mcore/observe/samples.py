"""Sample completions of rollout steps and evaluations: samples/step_000012.jsonl and samples/eval/step_000010.jsonl.

Change here: which completions are written, and what is written about each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_mcore.observe.sinks import json_line

if TYPE_CHECKING:
    from dapo_mcore.types import Group, Prompt, Rollout, Sample


def write_samples(run_dir: Path, step: int, picked: Sequence[tuple[Prompt, Sample]]) -> Path | None:
    """Write the completions that `pick_samples` has chosen. Return the file, None if there is nothing to write."""
    return _write(Path(run_dir) / "samples" / f"step_{step:06d}.jsonl", [_record(*one) for one in picked])


def write_answers(run_dir: Path, step: int, sets: Mapping[str, Sequence[Group]], count: int | None) -> Path | None:
    """Write at most `count` answers (None: all) of each evaluation set after rollout step `step`. Return the file, None if empty."""
    records = [{"set": name, **_record(*one)} for name, groups in sets.items() for one in pick_samples(groups, count)]
    return _write(Path(run_dir) / "samples" / "eval" / f"step_{step:06d}.jsonl", records)


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> Path | None:
    if not records:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(json_line, records)), encoding="utf-8")
    return path


def pick_samples(groups: Sequence[Group], count: int | None) -> list[tuple[Prompt, Sample]]:
    """Return at most `count` samples (None: all), right and wrong alternating as long as there are both, from many prompts first."""
    rounds = zip_longest(*([(group.prompt, sample) for sample in group.samples] for group in groups))
    candidates = [pair for pair in chain.from_iterable(rounds) if pair is not None]
    right = [pair for pair in candidates if pair[1].score.right]
    wrong = [pair for pair in candidates if not pair[1].score.right]
    alternating = [pair for pair in chain.from_iterable(zip_longest(right, wrong)) if pair is not None]
    return alternating[:count]


def few_answers(groups: Mapping[str, Sequence[Group]], count: int = 4) -> dict[str, str]:
    """Return at most `count` answers of each evaluation set in a line each, by the set's name and row."""
    rows = {}
    for name, prompts in groups.items():
        for group in prompts[:count]:
            sample = group.samples[0]
            verdict = "right" if sample.score.right else f"wrong, the answer is {group.prompt.answer}"
            rows[f"{name} {group.prompt.row.rpartition(' ')[2]}"] = (
                f"{_short(group.prompt.text)} → {_short(sample.text)}  ({verdict})"
            )
    return rows


def _record(prompt: Prompt, sample: Sample) -> dict[str, Any]:
    score, rollout = sample.score, sample.rollout
    return {
        "uid": prompt.uid,
        "row": prompt.row,
        "prompt": prompt.text,
        "response": sample.text,
        "pred": score.pred,
        "answer": prompt.answer,
        "source": prompt.source,
        "acc": float(score.acc),
        "score": float(score.score),
        "penalty": float(score.penalty),
        "reward": float(score.reward),
        "failure": score.failure,
        "length": len(rollout.token_ids),
        "finish_reason": rollout.finish_reason,
        "weight_version": rollout.weight_version,
        **({"version_spans": rollout.version_spans} if rollout.version_spans else {}),
        **({"num_turns": rollout.num_turns, "calls": list(map(asdict, rollout.calls))} if _has_tools(rollout) else {}),
    }


def _has_tools(rollout: Rollout) -> bool:
    return rollout.num_turns > 1 or bool(rollout.calls)


def _short(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"…{line[-limit:]}"
