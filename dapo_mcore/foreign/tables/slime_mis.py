"""Rules of slime's table about its example of importance weights with rejection, whose settings are in a YAML file.

Change here: how the settings of slime's examples/train_infer_mismatch_helper/mis.py (624b824) become algo.tis and algo.rejection.
"""

from __future__ import annotations

from collections.abc import Iterator

from dapo_mcore.foreign.table import Outcome, Source, became, gone

SETTINGS = (
    "use-rs", "tis-mode", "tis-level", "tis-lower-bound", "tis-upper-bound", "tis-batch-normalize", "rs-level", "rs-lower-bound",
    "rs-upper-bound", "rs-veto-threshold",
)  # fmt: skip
FUNCTION = "mis.compute_mis_weights_with_cp"
_MODES = {"truncate": "truncate", "clip": "truncate", "mask": "icepop"}


def correction(source: Source, function: str) -> Iterator[Outcome]:
    """Yield importance weights and rejection. function: the key that names slime's function."""
    mode, upper, low = source["tis-mode"], source["tis-upper-bound"], source["tis-lower-bound"]
    lower, of = (1 / upper, "tis-upper-bound") if low is None else (low, "tis-lower-bound")
    if mode not in _MODES:
        yield gone(f"there are no weights {mode} here; nearest: {', '.join(_MODES)}", "tis-mode", objective=True)
        return
    note = "masked tokens keep their KL and entropy terms here" if mode == "mask" else "importance weights"
    yield Outcome("converted", ("tis-mode", function, "use-tis"), "algo.tis.mode", _MODES[mode], note)
    yield became(source, "algo.tis.level", source["tis-level"], "tis-level")
    yield became(source, "algo.tis.cap", upper, "tis-upper-bound")
    if mode == "truncate" and low is not None:
        yield Outcome(
            "meaningless",
            ("tis-lower-bound",),
            note="mode truncate has none; rejection takes it, if it has none itself",
        )
    elif mode != "truncate":
        yield became(source, "algo.tis.lower", lower, of, note="" if of == "tis-lower-bound" else "1 / upper bound")
    yield from _mean(source, mode)
    yield from _rejection(source, lower, upper)


def _mean(source: Source, mode: str) -> Iterator[Outcome]:
    key = "tis-batch-normalize"
    if source[key] and mode == "mask":
        yield gone("weights in bounds are not divided by their mean; nearest: tis-mode clip", key, objective=True)
    else:
        note = "the mean over a rollout step; slime's is over a micro-batch" if source[key] else ""
        yield became(source, "algo.tis.normalize", bool(source[key]), key, note=note)


def _rejection(source: Source, lower: float, upper: float) -> Iterator[Outcome]:
    """Yield algo.rejection. Bounds that are not set are those of the weights."""
    if not source["use-rs"]:
        for key in filter(source.gives, (key for key in SETTINGS if key.startswith("rs-"))):
            yield Outcome("meaningless", (key,), note="use-rs is off")
        return
    bounds = {"lower": source["rs-lower-bound"], "upper": source["rs-upper-bound"]}
    bounds = {"lower": lower if bounds["lower"] is None else bounds["lower"], "upper": bounds["upper"] or upper}
    criteria, veto = [{"level": source["rs-level"], **bounds}], source["rs-veto-threshold"]
    if veto is not None:
        criteria.append({"level": "every", "lower": veto})
    keys = ("use-rs", "rs-level", "rs-lower-bound", "rs-upper-bound", "rs-veto-threshold")
    yield Outcome(
        "converted", keys, "algo.rejection", criteria, "the last one is the veto" if veto is not None else "bounds of r"
    )
    yield Outcome("converted", ("use-rs",), "algo.rejection_divisor", "all", "rejected tokens count in slime's divisor")
