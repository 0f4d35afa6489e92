"""Compares what two recorded steps trained on: prompts, requests, tokens, log-probs and rewards, in causal order.

Change here: what is compared of the samples. Loops pass over samples, never over tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from dapo_mcore.replay.compare import Check, Terms, Verdict, count
from dapo_mcore.replay.record import FINISH_REASONS, BatchRecord, PromptRecord

Label = Callable[[int], str]
"""Returns the name of a sample for people."""


def compare_prompts(a: Sequence[PromptRecord], b: Sequence[PromptRecord]) -> Check:
    """Return the check of the prompts that two steps trained on, in their order."""
    uids = [prompt.uid for prompt in a], [prompt.uid for prompt in b]
    if uids[0] == uids[1]:
        return Check("prompts", Verdict.EQUAL, count(len(a), "prompt"))
    place = next((i for i, pair in enumerate(zip(*uids)) if pair[0] != pair[1]), min(len(a), len(b)))
    told = " against ".join(f"{run[place].uid} ({run[place].row})" if place < len(run) else "none" for run in (a, b))
    shared = (Counter(uids[0]) & Counter(uids[1])).total()
    if shared == len(a) == len(b):
        detail = f"the same {shared} in another order, from number {place + 1} on: {told}"
    else:
        detail = f"number {place + 1} of {len(a)}: {told}; {shared} are in both"
    values = [run[place] if place < len(run) else None for run in uids]
    return Check("prompts", Verdict.DIFFERS, detail, {"prompt": place, "values": values, "in_both": shared})


def compare_samples(prompts: Sequence[PromptRecord], a: BatchRecord, b: BatchRecord, terms: Terms) -> Iterator[Check]:
    """Yield the checks of two batches that have the same prompts. Stop after the first if their groups have other sizes."""
    sizes = [np.bincount(record.batch.group_ids, minlength=len(prompts)) for record in (a, b)]
    if (group := _first(*sizes)) is not None:
        values = [int(size[group]) for size in sizes]
        detail = f"prompt {prompts[group].uid} has {values[0]} responses against {values[1]}"
        yield Check("requests", Verdict.DIFFERS, detail, {"prompt": group, "values": values})
        return

    def label(sample: int) -> str:
        group = int(a.batch.group_ids[sample])
        number = sample - int(np.searchsorted(a.batch.group_ids, group)) + 1
        return f"sample {sample} ({prompts[group].row or prompts[group].uid}, response {number} of {sizes[0][group]})"

    yield _compare_columns("requests", {"seed": (a.origins.seeds, b.origins.seeds)}, label)
    yield _compare_versions(a, b, label)
    yield _compare_tokens(a, b, label)
    yield _compare_logprobs(a, b, label, terms)
    yield _compare_columns("rewards", _columns_of_rewards(a, b), label)
    yield _compare_masks(a, b, label)


def _compare_columns(name: str, columns: dict[str, tuple[np.ndarray, np.ndarray]], label: Label) -> Check:
    """Return the check of numbers per sample, which must be bitwise equal."""
    differs = {key: _bits(ours) != _bits(theirs) for key, (ours, theirs) in columns.items()}
    anywhere = np.logical_or.reduce(list(differs.values()))
    if not anywhere.any():
        return Check(name, Verdict.EQUAL, count(len(anywhere), "sample"))
    sample = int(anywhere.argmax())
    values = {
        key: [column[sample].item() for column in columns[key]]
        for key, differing in differs.items()
        if differing[sample]
    }
    told = ", ".join(f"{key} {ours} against {theirs}" for key, (ours, theirs) in values.items())
    detail = f"{label(sample)}: {told}{_others(int(anywhere.sum()), len(anywhere))}"
    return Check(name, Verdict.DIFFERS, detail, {"sample": sample, "values": values})


def _columns_of_rewards(a: BatchRecord, b: BatchRecord) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    origins = {"score": "scores", "penalty": "penalties", "acc": "accs"}
    columns = {name: (getattr(a.origins, own), getattr(b.origins, own)) for name, own in origins.items()}
    return {
        "reward": (a.batch.rewards, b.batch.rewards),
        **columns,
        "in statistics": (a.batch.in_statistics, b.batch.in_statistics),
    }


def _compare_versions(a: BatchRecord, b: BatchRecord, label: Label) -> Check:
    """Return the check of the weight versions that produced each sample, with the token from which each one held."""
    name, num_samples = "weight versions", len(a.origins.seeds)
    spans = [_spans(record) for record in (a, b)]
    if np.array_equal(*spans):
        versions = ", ".join(map(str, np.unique(spans[0][:, 2])))
        return Check(name, Verdict.EQUAL, f"{count(num_samples, 'sample')} of version {versions}")
    row = _first(*spans)
    sample = int(min(part[row, 0] for part in spans if row < len(part)))
    values = [part[part[:, 0] == sample, 1:].tolist() for part in spans]
    told = " against ".join(", then ".join(f"{version} from token {start}" for start, version in own) for own in values)
    return Check(name, Verdict.DIFFERS, f"{label(sample)}: {told}", {"sample": sample, "values": values})


def _spans(record: BatchRecord) -> np.ndarray:
    origins = record.origins
    return np.stack([origins.span_samples, origins.span_starts, origins.span_versions], axis=1)


def _compare_tokens(a: BatchRecord, b: BatchRecord, label: Label) -> Check:
    """Return the check of tokens, prompt and response, and of why responses ended."""
    places = [_first(*pair) for pair in _pairs(a, b, "tokens")]
    differing = [sample for sample, place in enumerate(places) if place is not None]
    if not differing:
        reasons = tuple(np.array(FINISH_REASONS)[record.origins.finish_reasons] for record in (a, b))
        ends = _compare_columns("tokens", {"end": reasons}, label)
        return (
            Check("tokens", Verdict.EQUAL, count(len(a.batch.tokens), "token"))
            if ends.verdict is Verdict.EQUAL
            else ends
        )
    sample, position = differing[0], places[differing[0]]
    values = [_at(record, sample, position) for record in (a, b)]
    told = " against ".join("its end" if value is None else str(value) for value in values)
    by_tool = " (tool output)" if all(_in_tool_output(record, sample, position) for record in (a, b)) else ""
    detail = f"{label(sample)}, token {position}{by_tool}: {told}{_others(len(differing), len(places))}"
    return Check("tokens", Verdict.DIFFERS, detail, {"sample": sample, "position": position, "values": values})


def _at(record: BatchRecord, sample: int, position: int) -> int | None:
    start, stop = record.batch.offsets[sample : sample + 2]
    return int(record.batch.tokens[start + position]) if start + position < stop else None


def _in_tool_output(record: BatchRecord, sample: int, position: int) -> bool:
    """Return True for a token without loss after one with loss: the policy did not write it. A sample that is left out of the
    loss does not tell."""
    start, stop = record.batch.offsets[sample : sample + 2]
    mask = record.batch.loss_mask[start:stop]
    return bool(position < len(mask) and mask[:position].any() and not mask[position])


def _compare_logprobs(a: BatchRecord, b: BatchRecord, label: Label, terms: Terms) -> Check:
    """Return the check of the engine's log-probs on the tokens up to each sample's first differing one."""
    name, largest, where, num_differing = "rollout log-probs", 0.0, None, 0
    pairs = zip(_pairs(a, b, "tokens"), _pairs(a, b, "rollout_logprobs"))
    for sample, (tokens, logprobs) in enumerate(pairs):
        place = _first(*tokens)
        ours, theirs = (part[:place] for part in logprobs)
        if np.array_equal(_bits(ours), _bits(theirs)):
            continue
        num_differing += 1
        gaps = np.abs(ours.astype(np.float64) - theirs)
        gaps[np.isnan(gaps)] = np.inf
        if where is None or gaps.max() > largest:
            largest, where = float(gaps.max()), (sample, int(gaps.argmax()))
    if where is None:
        return Check(name, Verdict.EQUAL, "all, of the tokens that are equal")
    sample, position = where
    values = [float(record.batch.rollout_logprobs[record.batch.offsets[sample] + position]) for record in (a, b)]
    told = f"{values[0]:.6g} against {values[1]:.6g}, the largest difference ({largest:.1e})"
    detail = f"{label(sample)}, token {position}: {told}{_others(num_differing, len(a.origins.seeds))}"
    place = {"sample": sample, "position": position, "values": values}
    return Check(name, terms.verdict(largest), detail, place, largest)


def _compare_masks(a: BatchRecord, b: BatchRecord, label: Label) -> Check:
    """Return the check of which tokens have a loss."""
    name = "loss mask"
    for sample, pair in enumerate(_pairs(a, b, "loss_mask")):
        if (position := _first(*pair)) is not None:
            values = [int(np.count_nonzero(part)) for part in pair]
            detail = f"{label(sample)}, from token {position}: {values[0]} loss tokens against {values[1]}"
            return Check(name, Verdict.DIFFERS, detail, {"sample": sample, "position": position, "values": values})
    return Check(name, Verdict.EQUAL, count(int(np.count_nonzero(a.batch.loss_mask)), "loss token"))


def _pairs(a: BatchRecord, b: BatchRecord, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each sample's part of an array over tokens, from both records."""
    return zip(*(_parts(getattr(record.batch, name), record.batch.offsets) for record in (a, b)), strict=True)


def _parts(flat: np.ndarray, offsets: np.ndarray) -> Iterator[np.ndarray]:
    return (flat[start:stop] for start, stop in pairwise(offsets.tolist()))


def _first(a: np.ndarray, b: np.ndarray) -> int | None:
    """Return the first index at which two arrays differ, or the length of the shorter one; None if they are equal."""
    common = min(len(a), len(b))
    unequal = a[:common] != b[:common]
    if unequal.any():
        return int(np.unravel_index(unequal.argmax(), unequal.shape)[0])
    return None if len(a) == len(b) else common


def _bits(values: np.ndarray) -> np.ndarray:
    """Return floats as integers: a NaN equals itself."""
    return values.view(f"u{values.itemsize}") if values.dtype.kind == "f" else values


def _others(differing: int, number: int) -> str:
    return f"; {differing:,} of {number:,} samples differ" if differing > 1 else ""
