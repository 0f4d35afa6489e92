"""Where a dotted key leads in the configuration's sections: the type of its value, and which key was meant by a wrong one.

Change here: how a key is looked up, and what counts as near.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dapo_mcore.config import Config
from dapo_mcore.config_types import Prose, Section

_NEAR = 0.7
_NEAR_IN_SECTION = 0.6
_LONGEST_KEY = 64
_OTHER_NAMES = {
    "n": "rollout.group_size",
    "train_batch_size": "sampling.train_batch_prompts",
    "gen_batch_size": "sampling.gen_batch_prompts",
    "ppo_mini_batch_size": "batch.mini_batch_prompts",
    "ppo_epochs": "batch.epochs",
    "clip_ratio_low": "algo.clip_low",
    "clip_ratio_high": "algo.clip_high",
    "clip_ratio_c": "algo.dual_clip",
    "learning_rate": "optimizer.lr",
    "tensor_model_parallel_size": "parallel.tensor_parallel",
    "pipeline_model_parallel_size": "parallel.pipeline_parallel",
    "context_parallel_size": "parallel.context_parallel",
    "expert_model_parallel_size": "parallel.expert_parallel",
    "total_training_steps": "num_rollout_steps",
    "save_freq": "checkpoint.every",
    "test_freq": "eval.every",
    "experiment_name": "name",
    "default_local_dir": "output_dir",
}
"""What verl calls the same quantity in the same unit."""


def type_below(kind: Any, key: str) -> Any:
    """Return the type of the value under `key` in a value of type `kind`: Any in a free mapping, None for an unknown key."""
    for option in options(kind):
        if is_section(option):
            return _fields(option).get(key)
        if get_origin(option) is dict:
            return get_args(option)[1]
        if option is Any:
            return Any
    return None


def type_of_items(kind: Any) -> Any:
    """Return the type of an item of a list; None where `kind` is no list."""
    return next((get_args(option)[0] for option in options(kind) if get_origin(option) is list), None)


def options(kind: Any) -> list[Any]:
    """Return the alternatives of a type: `Annotated[str, …] | None` gives [str, NoneType]."""
    origin = get_origin(kind)
    if origin is Annotated:
        return options(get_args(kind)[0])
    if origin in (Union, UnionType):
        return [option for part in get_args(kind) for option in options(part)]
    return [kind]


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def is_text(kind: Any) -> bool:
    """Return True for a type whose values are text, words to choose from included, and perhaps null."""
    kinds = [option for option in options(kind) if option is not NoneType]
    return bool(kinds) and all(option is str or get_origin(option) is Literal for option in kinds)


def is_prose(kind: Any) -> bool:
    """Return True for a type marked as text for people or models (config_types.Prose)."""
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        return Prose in marks or is_prose(inner)
    return any(is_prose(part) for part in get_args(kind))


def nearest_keys(path: Sequence[str]) -> list[str]:
    """Return the dotted keys that an unknown one may have meant, the best first; equally good ones together.

    The last name is searched in all sections, and `kl_coef` finds `algo.kl.coef`, too. Where it is there nowhere as it
    stands, a name like it in the same section wins over one in another.
    """
    *parents, name = path
    if len(name) > _LONGEST_KEY:
        return []
    if name in _OTHER_NAMES:
        return [_OTHER_NAMES[name]]
    likeness = {key: max(_likeness(name, form) for form in _forms(key)) for key in _all_keys()}
    best = max(likeness.values())
    anywhere = [key for key, score in likeness.items() if score == best >= _NEAR]
    if best == 1:
        return anywhere
    return _near_in(parents, name, _NEAR_IN_SECTION) or anywhere


def _near_in(section: Sequence[str], name: str, cutoff: float) -> list[str]:
    near = difflib.get_close_matches(name, _keys_of(section), n=1, cutoff=cutoff)
    return [".".join([*section, key]) for key in near]


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _forms(key: str) -> list[str]:
    """`algo.kl.coef` as people write its end: coef, kl_coef."""
    parts = key.split(".")
    return ["_".join(parts[-count:]) for count in (1, 2) if count <= len(parts)]


def _keys_of(path: Sequence[str]) -> list[str]:
    kind: Any = Config
    for part in path:
        kind = type_below(kind, part)
    return [key for option in options(kind) if is_section(option) for key in _fields(option)]


@cache
def _fields(section: type[Section]) -> dict[str, Any]:
    hints = get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in section.model_fields}


@cache
def _all_keys() -> tuple[str, ...]:
    """Every dotted key, without those of named sets and of the warm start's own prompts, which repeat those of `data`."""
    return tuple(key for key in _walk(Config, "") if not key.startswith("warm_start.choose."))


def _walk(section: type[Section], prefix: str) -> Iterator[str]:
    for name, kind in _fields(section).items():
        yield prefix + name
        for option in filter(is_section, options(kind)):
            yield from _walk(option, f"{prefix}{name}.")
