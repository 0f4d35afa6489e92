"""Compares what two records say of a step's training: plan, log-probs, gradients, metrics and weights, in causal order.

Change here: what is compared of a step's training, and which differences count as rounding. compare_samples.py compares what
it trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dapo_mcore.replay.record import Digest, Digests, Setting, StepRecord

ROUNDING = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest difference that another order of sums may cause, by model.dtype."""
NEGLIGIBLE = 1e-2
"""Share of the largest norm. A smaller tensor may hold nothing but rounding, such as the gradient of keys' biases, and Adam moves
its weights as far as others. So its differences are told relative to this share."""
_FIRST_METRICS = ("loss", "grad_norm", "lr")
_EXACT_METRICS = ("lr", "tokens")


class Verdict(StrEnum):
    """The outcome of comparing one thing."""

    EQUAL = "equal"
    ROUNDING = "rounding"
    DIFFERS = "differs"
    UNKNOWN = "not compared"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing of a step, compared between records `a` and `b`.

    name    what was compared: `tokens`
    detail  in words: how much is equal, or the first difference
    place   the first difference as JSON values: {"sample": 17, "position": 41, "values": [12, 19]}
    size    the largest difference of numbers, where it may be rounding: relative to a tensor's norm, absolute for log-probs
    """

    name: str
    verdict: Verdict
    detail: str
    place: Mapping[str, Any] = field(default_factory=dict)
    size: float = 0.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What two records have in common, which decides what a difference between them means.

    same_layout  the parallel layouts are the same, so micro-batches and each rank's share should be
    exact        so are packages, devices and flags, and a run there repeats its bits: no difference is rounding
    rounding     the largest difference that counts as rounding if not `exact`
    """

    same_layout: bool
    exact: bool
    rounding: float

    @classmethod
    def of(cls, a: Setting, b: Setting, dtype: str) -> Terms:
        """Return the terms of two records with these settings and this model.dtype."""
        repeats = a.flags["deterministic"] == "True" or all(device.startswith("cpu") for device in a.devices)
        return cls(a.layout == b.layout, a == b and repeats, ROUNDING[dtype])

    def verdict(self, size: float) -> Verdict:
        """Return the verdict on numbers that are not bitwise equal and differ by `size`."""
        return Verdict.ROUNDING if not self.exact and size <= self.rounding else Verdict.DIFFERS


def compare_training(a: StepRecord, b: StepRecord, terms: Terms) -> list[Check]:
    """Return the checks of a step's training, from the plan to the weights after it."""
    return [
        compare_plans(a.plan, b.plan, terms),
        *_compare_inputs(a.inputs, b.inputs, terms),
        *_compare_updates(a, b, terms),
        compare_digests("weights after", a.weights, b.weights, terms),
    ]


def compare_digests(name: str, a: Digests, b: Digests, terms: Terms) -> Check:
    """Return the check of tensors: the first one that differs, and the one that differs most."""
    if missing := [tensor for tensor in (*a, *b) if (tensor in a) != (tensor in b)]:
        where = "the first run" if missing[0] in a else "the second run"
        return Check(
            name, Verdict.DIFFERS, f"only {where} has {missing[0]}", {"tensor": missing[0], "missing": len(missing)}
        )
    differing = [tensor for tensor in a if a[tensor].hash != b[tensor].hash]
    if not differing:
        return Check(name, Verdict.EQUAL, count(len(a), "tensor"))
    smallest = NEGLIGIBLE * max(digest.norm for digest in (*a.values(), *b.values()))
    sizes = {tensor: _distance(a[tensor], b[tensor], smallest) for tensor in differing}
    worst, first = max(sizes, key=sizes.__getitem__), differing[0]
    norms = [a[first].norm, b[first].norm]
    place = {"tensor": first, "norms": norms, "differing": len(differing), "tensors": len(a), "worst_tensor": worst}
    detail = f"norm {against(*norms)}, apart by {sizes[first]:.1e} of it"
    if len(a) > 1:
        most = "" if worst == first else f", most {worst}, by {sizes[worst]:.1e}"
        detail = f"{first}, {detail}; {len(differing)} of {len(a)} tensors differ{most}"
    return Check(name, terms.verdict(sizes[worst]), detail, place, sizes[worst])


def _distance(a: Digest, b: Digest, smallest: float) -> float:
    """Return the estimated norm of the difference of two tensors, relative to their norm or to `smallest` if that is larger."""
    change = max(abs(a.norm - b.norm), abs(a.projection - b.projection))
    norm = max(a.norm, b.norm, smallest)
    return change / norm if math.isfinite(change) and norm else math.inf


def compare_plans(a: list[list[list[list[int]]]], b: list[list[list[list[int]]]], terms: Terms) -> Check:
    """Return the check of two plans: plan[m][r][k] as in StepRecord. Other layouts share the same mini-batches out otherwise."""
    name = "plan"
    if a == b:
        return Check(name, Verdict.EQUAL, count(len(a), "mini-batch", "mini-batches"))
    if len(a) != len(b):
        return Check(name, Verdict.DIFFERS, f"{len(a)} mini-batches against {len(b)}", {"values": [len(a), len(b)]})
    for number, (ours, theirs) in enumerate(zip(a, b), 1):
        if only := sorted(_samples(ours) ^ _samples(theirs)):
            where = "first" if only[0] in _samples(ours) else "second"
            detail = (
                f"mini-batch {number}: sample {only[0]} only in the {where} run, as {count(len(only) - 1, 'other')}"
            )
            return Check(name, Verdict.DIFFERS, detail, {"mini_batch": number, "samples": only})
    if not terms.same_layout:
        replicas = f"{len(a[0])} replicas against {len(b[0])}"
        return Check(name, Verdict.EQUAL, f"{count(len(a), 'mini-batch', 'mini-batches')}, in shares of {replicas}")
    return _first_share(name, a, b)


def _first_share(name: str, a: list[list[list[list[int]]]], b: list[list[list[list[int]]]]) -> Check:
    """Return the check that names the first rank's share which differs between plans with the same mini-batches."""
    for number, mini_batches in enumerate(zip(a, b), 1):
        for replica, (ours, theirs) in enumerate(zip(*mini_batches)):
            if ours != theirs:
                micro = next(
                    (k for k, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs))
                )
                values = [_micro_batch(ours, micro), _micro_batch(theirs, micro)]
                where = f"mini-batch {number}, replica {replica}, micro-batch {micro + 1}"
                told = " against ".join(_few(samples) for samples in values)
                place = {"mini_batch": number, "replica": replica, "micro_batch": micro + 1, "values": values}
                return Check(name, Verdict.DIFFERS, f"{where}: {told}", place)
    return Check(
        name, Verdict.DIFFERS, f"{len(a[0])} replicas against {len(b[0])}", {"replicas": [len(a[0]), len(b[0])]}
    )


def _samples(mini_batch: list[list[list[int]]]) -> set[int]:
    return {sample for replica in mini_batch for micro_batch in replica for sample in micro_batch}


def _micro_batch(micro_batches: list[list[int]], number: int) -> list[int]:
    return micro_batches[number] if number < len(micro_batches) else []


def _few(samples: list[int]) -> str:
    if not samples:
        return "none"
    return f"samples {', '.join(map(str, samples[:6]))}{' …' if len(samples) > 6 else ''}"


def _compare_inputs(a: Digests, b: Digests, terms: Terms) -> Iterator[Check]:
    """Yield a check for each input of the gradient steps: log-probs of the policies, values, and what is computed of them."""
    for key in sorted({*a, *b}, key=lambda key: (key in ("advantages", "returns"), key)):
        ours, theirs = ({key: digests[key]} if key in digests else {} for digests in (a, b))
        yield compare_digests(key.replace("_logprobs", " log-probs"), ours, theirs, terms)


def _compare_updates(a: StepRecord, b: StepRecord, terms: Terms) -> Iterator[Check]:
    if len(a.updates) != len(b.updates):
        counts = [len(a.updates), len(b.updates)]
        yield Check("updates", Verdict.DIFFERS, f"{counts[0]} gradient steps against {counts[1]}", {"values": counts})
    for number, (ours, theirs) in enumerate(zip(a.updates, b.updates), 1):
        name = f"update {number}"
        yield compare_digests(f"{name}: log-probs", {"log-probs": ours.logprobs}, {"log-probs": theirs.logprobs}, terms)
        yield compare_digests(f"{name}: gradient", ours.gradients, theirs.gradients, terms)
        skipped = {"skipped": float(ours.skipped)}, {"skipped": float(theirs.skipped)}
        yield compare_metrics(f"{name}: metrics", ours.metrics | skipped[0], theirs.metrics | skipped[1], terms)


def compare_metrics(name: str, a: Mapping[str, float], b: Mapping[str, float], terms: Terms) -> Check:
    """Return the check of metrics: loss, gradient norm and learning rate first, then the others in their order."""
    keys = dict.fromkeys([*(key for key in _FIRST_METRICS if key in a or key in b), *a, *b])
    missing = math.nan
    values = {key: (a.get(key, missing), b.get(key, missing)) for key in keys}
    differing = {key: pair for key, pair in values.items() if pair[0] != pair[1] and not all(map(math.isnan, pair))}
    if not differing:
        return Check(name, Verdict.EQUAL, count(len(keys), "number"))
    tokens = max(values.get("tokens", (1.0,)))
    sizes = {key: _metric_distance(key, *pair, tokens) for key, pair in differing.items()}
    verdicts = {key: terms.verdict(size) for key, size in sizes.items()}
    beyond = [key for key, verdict in verdicts.items() if verdict is Verdict.DIFFERS]
    first = (beyond or list(differing))[0]
    detail = f"{first} {against(*values[first])}"
    if len(differing) > 1:
        detail += f"; {len(differing)} of {len(keys)} numbers differ"
    place = {"metric": first, "values": list(values[first]), "differing": len(differing)}
    return Check(name, verdicts[first], detail, place, max(sizes.values()))


def _metric_distance(key: str, a: float, b: float, tokens: float) -> float:
    """Return the difference, relative to the size of what was added up: for most metrics a number per token."""
    if key in _EXACT_METRICS or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b), 1.0 if key in _FIRST_METRICS else tokens)


def against(a: float, b: float) -> str:
    """Return two numbers for people, with as many digits as tell them apart."""
    texts = ((f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in (6, 9, 12, 15, 17))
    ours, theirs = next((pair for pair in texts if pair[0] != pair[1]), (f"{a:.6g}",) * 2)
    return f"{ours} against {theirs}" if ours != theirs else f"{ours} in both"


def count(number: int, what: str, several: str = "") -> str:
    return f"{number:,} {what if number == 1 else several or f'{what}s'}"
