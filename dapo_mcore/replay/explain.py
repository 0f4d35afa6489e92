"""Says where two runs begin to differ: the first rollout step, and the first thing in it, by their records.

Change here: the order in which steps are compared, and what is said of runs without records. details.py adds texts of tokens
and elements of weights to what is found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from dapo_mcore.errors import RecordError
from dapo_mcore.observe.sinks import METRICS_FILE
from dapo_mcore.replay.compare import Check, Terms, Verdict, compare_digests, compare_training
from dapo_mcore.replay.compare_rows import compare_rows, only_in_one, rows_of
from dapo_mcore.replay.compare_samples import compare_prompts, compare_samples
from dapo_mcore.replay.details import with_details
from dapo_mcore.replay.record import has_batch, read_batch, read_step
from dapo_mcore.replay.recorded_run import Difference, RecordedRun, Runs, read_settings, setting_differences


class Found(NamedTuple):
    """A difference: a check that is not equal, and its rollout step."""

    step: int
    check: Check


@dataclass(frozen=True)
class Explanation:
    """The comparison of the runs `a` and `b`.

    steps     rollout steps that were compared, in order; none after one that differs beyond rounding
    first     the first difference, be it rounding; None if there is none
    beyond    the first difference that is no rounding; None if there is none
    rounding  the largest difference that counts as rounding
    shown     the step of `settings` and `checks`: the one that differs, else the last one compared
    checks    of that step, in causal order
    settings  those that differ in that step
    notes     sentences about what was not compared
    """

    a: Path
    b: Path
    steps: list[int]
    first: Found | None
    beyond: Found | None
    rounding: float
    shown: int
    checks: list[Check]
    settings: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """Return EQUAL, ROUNDING or DIFFERS."""
        return Verdict.DIFFERS if self.beyond else Verdict.ROUNDING if self.first else Verdict.EQUAL


def explain(a: Path, b: Path, step: int | None = None) -> Explanation:
    """Return where the runs in these folders begin to differ; with `step`, compare this rollout step alone.

    Without records, compare the rows of metrics.jsonl. Raise RecordError if there is nothing to compare.
    """
    for path in (a, b):
        if not path.is_dir():
            raise RecordError(f"no run at {path}; give the folder of a run (output_dir/name of its configuration)")
    runs = RecordedRun(a), RecordedRun(b)
    if without := [path for path, run in zip((a, b), runs) if not run.steps]:
        return _explain_rows((a, b), without, step)
    found = _explanation((a, b), _compared(runs, _common((a, b), [run.steps for run in runs], step)))
    settings = setting_differences(*(run.settings(found.shown) for run in runs))
    found = replace(found, settings=settings, notes=_alone(runs) if step is None else [])
    return found if found.beyond is None else _with_details(found, runs)


def _explain_rows(paths: tuple[Path, Path], without: Sequence[Path], step: int | None) -> Explanation:
    """Return the explanation of runs of which some, `without`, have no records."""
    told = " and ".join(map(str, without))
    if not all((path / METRICS_FILE).is_file() for path in paths):
        raise RecordError(f"{told} has no records to compare: run it again with observe.record=true")
    rows = [rows_of(path) for path in paths]
    pairs = {number: [own[number] for own in rows] for number in _common(paths, rows, step)}
    found = _explanation(paths, ((number, [compare_rows(*pair)]) for number, pair in pairs.items()))
    files = [path / "config.yaml" for path in paths]
    settings = setting_differences(*map(read_settings, files)) if all(file.is_file() for file in files) else []
    notes = [f"Without records of {told} their metrics are all that can be compared; observe.record=true keeps more."]
    if alone := dict.fromkeys(name for number in found.steps for name in only_in_one(*pairs[number])):
        notes.append(f"Not compared, since only one of the runs has them in a step: {', '.join(alone)}.")
    return replace(found, settings=settings, notes=notes)


def _common(paths: tuple[Path, Path], steps: Sequence[Collection[int]], only: int | None) -> list[int]:
    """Return the steps to compare: those that both runs have, or `only` one of them."""
    common = sorted(set(steps[0]) & set(steps[1]))
    if common and only is None:
        return common
    if only in common:
        return [only]
    told = ", ".join(f"{path} has {span(own)}" for path, own in zip(paths, steps))
    wanted = "no rollout step" if only is None else f"no rollout step {only}"
    raise RecordError(f"the two runs have {wanted} in common: {told}")


def span(steps: Collection[int]) -> str:
    """Return steps for people: `steps 1 to 3`."""
    return f"steps {min(steps)} to {max(steps)}" if len(steps) > 1 else f"step {min(steps)}" if steps else "none"


def _alone(runs: Runs) -> list[str]:
    """Return a sentence about the steps that only one run has."""
    alone = [sorted(set(run.steps) - set(other.steps)) for run, other in (runs, runs[::-1])]
    return [f"Only {run.path} has {span(steps)}, too." for run, steps in zip(runs, alone) if steps]


def _explanation(paths: tuple[Path, Path], compared: Iterator[tuple[int, list[Check]]]) -> Explanation:
    """Return the explanation of steps and their checks, read until one differs beyond rounding."""
    steps, first, beyond, rounding, shown = [], None, None, 0.0, (0, [])
    for step, checks in compared:
        steps.append(step)
        unequal = [Found(step, check) for check in checks if check.verdict in (Verdict.ROUNDING, Verdict.DIFFERS)]
        first = first or next(iter(unequal), None)
        beyond = next((found for found in unequal if found.check.verdict is Verdict.DIFFERS), None)
        rounding = max([rounding, *(f.check.size for f in unequal if f.check.verdict is Verdict.ROUNDING)])
        if first is None or first.step == step or beyond:
            shown = step, checks
        if beyond:
            break
    return Explanation(*paths, steps, first, beyond, rounding, *shown)


def _compared(runs: Runs, steps: Sequence[int]) -> Iterator[tuple[int, list[Check]]]:
    """Yield each step with its checks."""
    for step in steps:
        yield step, list(_checks(runs, step, with_weights=step == steps[0]))


def _checks(runs: Runs, step: int, *, with_weights: bool) -> Iterator[Check]:
    """Yield the checks of a step. The weights before it are compared where those after the step before were not."""
    terms = _terms(runs, step)
    if with_weights or any(run.begins_at(step) for run in runs):
        yield _weights_before(runs, step, terms)
    a, b = (read_step(run.path, step) for run in runs)
    prompts = compare_prompts(a.prompts, b.prompts)
    yield prompts
    if prompts.verdict is Verdict.DIFFERS:
        yield Check("samples", Verdict.UNKNOWN, "the prompts differ")
    elif without := [str(run.path) for run in runs if not has_batch(run.path, step)]:
        yield Check(
            "samples", Verdict.UNKNOWN, f"no batch of this step in {' and '.join(without)} (observe.record_keep)"
        )
    else:
        yield from compare_samples(a.prompts, *(read_batch(run.path, step) for run in runs), terms)
    yield from compare_training(a, b, terms)


def _terms(runs: Runs, step: int) -> Terms:
    """Return the terms of a step. Bits need not be equal if any start before it had other settings in the two runs."""
    settings = [run.start(step).setting for run in runs]
    terms = Terms.of(*settings, runs[0].settings(step)["model"]["dtype"])
    begun = [max(run.starts_before(step)[0] for run in runs)]
    begun += [after for run in runs for after in run.starts_before(step) if after > begun[0]]
    before = [[run.start(after + 1).setting for run in runs] for after in begun]
    return replace(terms, exact=terms.exact and all(a == b for a, b in before))


def _weights_before(runs: Runs, step: int, terms: Terms) -> Check:
    """Return the check of the weights before a step. Those of a new run are read or drawn: no rounding has touched them."""
    weights = [run.weights_before(step) for run in runs]
    if None in weights:
        return Check("weights before", Verdict.UNKNOWN, f"no record of step {step - 1}")
    drawn = step == 1 and all(run.settings(step)["warm_start"] is None for run in runs)
    return compare_digests("weights before", *weights, replace(terms, exact=True) if drawn else terms)


def _with_details(found: Explanation, runs: Runs) -> Explanation:
    """Return the explanation with more said of its difference beyond rounding."""
    step, check = found.beyond
    told = with_details(check, runs, step)
    beyond = Found(step, told)
    return replace(
        found,
        first=beyond if found.first == found.beyond else found.first,
        beyond=beyond,
        checks=[told if own is check else own for own in found.checks],
    )
