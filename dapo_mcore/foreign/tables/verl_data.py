"""Rules of verl's table about data: training prompts and evaluation sets.

Change here: how verl's files, and the sampling of its validation, become ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone

_ROLLOUT = "actor_rollout_ref.rollout"
_NEVER = 1_000_000_000
_VISION = re.compile(r"(?i)(?<![a-z])(vl|vlm|vision|llava|internvl|multimodal)(?![a-z])")
"""A part of a model's name that says that it reads images."""


def files(source: Source) -> Iterator[Outcome]:
    """Yield the training files."""
    key = "data.train_files"
    paths = as_list(source.path(key))
    if paths:
        yield Outcome("same" if source.path(key) == paths else "converted", (key,), "data.files", paths, "a list")
    else:
        yield asked("data.files", "the script names no file", key)


def as_list(value: Any) -> list[str]:
    """Return one path or several as a list, without empty ones."""
    return [str(path) for path in (value if isinstance(value, (list, tuple)) else [value]) if path]


def prompts(source: Source) -> Iterator[Outcome]:
    """Yield how prompts are read: verl renders chats, always."""
    yield Outcome("converted", ("data.prompt_key",), "data.chat_template", True, "verl renders every prompt")
    yield from long_prompts(source, "data")
    yield Outcome("converted", ("data.train_files",), "data.deduplicate", False, "verl keeps repeated rows")


def long_prompts(source: Source, section: str) -> Iterator[Outcome]:
    """Yield what happens to prompts that are too long; filter_overlong_prompts wins."""
    drop, cut = "data.filter_overlong_prompts", "data.truncation"
    if source[drop]:
        yield Outcome("converted", (drop,), f"{section}.on_long_prompt", "drop", "dropped before any truncation")
        if source.gives(cut):
            yield Outcome("meaningless", (cut,), note="filter_overlong_prompts wins")
    else:
        word = source[cut] if source[cut] == "error" else f"truncate_{source[cut]}"
        yield became(source, f"{section}.on_long_prompt", word, cut, note="" if word == "error" else "our word")


def vision_model(source: Source) -> Iterator[Outcome]:
    """Yield the loss of images where the model's name says that it reads them and no column of images is named."""
    key = "actor_rollout_ref.model.path"
    named = any(source[column] for column in ("data.image_key", "data.video_key") if source.is_known(column))
    if _VISION.search(str(source.path(key) or "")) and not named:
        yield gone(
            "a model of images: verl hands it those of the columns images and videos, and here rows are text; accept it for "
            "rows without them",
            key,
            objective=True,
        )


def response_length(source: Source) -> Iterator[Outcome]:
    """Yield the longest response. verl's agent loop cuts at rollout.response_length, which is data.max_response_length unless given."""
    data, cut = "data.max_response_length", f"{_ROLLOUT}.response_length"
    given = source[cut] if source.gives(cut) else None
    if given is None or given == source[data]:
        yield became(source, "rollout.max_response_tokens", source[data], data)
    else:
        note = f"responses are cut there, not at data.max_response_length {source[data]}"
        yield became(source, "rollout.max_response_tokens", given, cut, data, note=note)


def template_kwargs(source: Source) -> Iterator[Outcome]:
    """Yield what the chat template is told, for instance enable_thinking."""
    place = "data.apply_chat_template_kwargs"
    for key, value in {**(source[place] or {}), **source.below(place)}.items():
        whole = f"{place}.{key}" if source.gives(f"{place}.{key}") else place
        yield Outcome("same", (whole,), "data.chat_template_kwargs", {key: value})


def evaluation(source: Source) -> Iterator[Outcome]:
    """Yield the evaluation sets, one a file, and when they are evaluated."""
    every, first, key = "trainer.test_freq", "trainer.val_before_train", "data.val_files"
    often = source[every] is not None and source[every] > 0
    paths = as_list(source.path(key))
    if not paths or not (often or source[first]):
        for name in (key, every, first):
            if source.gives(name):
                yield Outcome("meaningless", (name,), note="nothing is evaluated")
        return
    yield became(
        source, "eval.every", source[every] if often else _NEVER, every, note="" if often else "never but at the start"
    )
    yield became(source, "eval.at_start", bool(source[first]), first)
    for name, path in zip(_set_names(paths), paths):
        yield from _set(source, f"eval.sets.{name}", path)
    yield from _sampling(source)


def _set(source: Source, place: str, path: str) -> Iterator[Outcome]:
    yield Outcome("converted", ("data.val_files",), f"{place}.files", [path], "a named set per file")
    for key, ours in {
        "data.prompt_key": "prompt_key",
        "data.reward_fn_key": "source_key",
        "data.max_prompt_length": "max_prompt_tokens",
    }.items():
        yield Outcome("same", (key,), f"{place}.{ours}", source[key])
    yield Outcome("converted", ("data.prompt_key",), f"{place}.chat_template", True, "verl renders every prompt")
    yield Outcome("converted", ("data.val_files",), f"{place}.deduplicate", False, "verl keeps repeated rows")
    yield from (line for line in long_prompts(source, place) if line.ours)
    if (source["data.val_max_samples"] or -1) > 0:
        yield Outcome("converted", ("data.val_max_samples",), f"{place}.limit", source["data.val_max_samples"], "rows")


def _sampling(source: Source) -> Iterator[Outcome]:
    """Yield how evaluation samples. do_sample=False with a temperature was greedy once, and is not at b178a3c."""
    place = f"{_ROLLOUT}.val_kwargs"
    old = {"n": f"{_ROLLOUT}.n_val", "temperature": f"{_ROLLOUT}.val_temperature"}
    for name, ours in {"n": "samples_per_prompt", "top_p": "top_p", "top_k": "top_k"}.items():
        key = source.first(f"{place}.{name}", old.get(name, f"{place}.{name}"))
        yield became(source, f"eval.{ours}", source[key], key)
    warm, sample = source.first(f"{place}.temperature", old["temperature"]), f"{place}.do_sample"
    if source[warm] and not source[sample] and warm not in old.values():
        note = f"0 if the script's verl takes do_sample=False for greedy (before its agent loop), {source[warm]:g} at b178a3c"
        yield asked("eval.temperature", note, sample if source.gives(sample) else warm, warm)
    else:
        yield became(source, "eval.temperature", source[warm], warm)
        if source.gives(sample):
            yield Outcome("meaningless", (sample,), note="the temperature says it")


def _set_names(paths: list[str]) -> list[str]:
    """Return a name per file: its own without the ending, numbered if several have it; its folder's if it is named test."""
    names: list[str] = []
    for path in map(PurePosixPath, paths):
        stem = (
            path.parent.name if path.stem in ("test", "val", "validation", "train") and path.parent.name else path.stem
        )
        clean = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-") or "set"
        names.append(clean if clean not in names else f"{clean}_{len(names) + 1}")
    return names
