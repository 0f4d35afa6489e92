"""Rules of verl's table about data: training prompts and evaluation sets.

Change here: how verl's files, and the sampling of its validation, become ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone, own_way
from dapo_mcore.foreign.tables.verl_defaults import is_fully_async

_ROLLOUT = "actor_rollout_ref.rollout"
VAL_KWARGS = tuple(f"{_ROLLOUT}.val_kwargs.{name}" for name in ("n", "temperature", "top_p", "top_k", "do_sample"))
"""How verl's validation samples."""
COLUMNS = {"data.image_key": "images", "data.video_key": "videos"}
"""The columns of images and videos, with verl's defaults."""
NO_IMAGES = "images and videos are not read: the policy would see the text alone"
_VISION = re.compile(r"(?i)(?<![a-z])(vl|vlm|vision|llava|internvl|multimodal)(?![a-z])")
"""A part of a model's name that says that it reads images."""


def files(source: Source) -> Iterator[Outcome]:
    """Yield the training files."""
    key = "data.train_files"
    paths = as_list(source.path(key))
    if paths:
        yield Outcome("same" if source.path(key) == paths else "converted", (key,), "data.files", paths, "a list")
    else:
        yield asked("data.files", "the script names no file that could be read", key)


def as_list(value: Any) -> list[str]:
    """Return one path or several as a list, without empty ones."""
    return [str(path) for path in (value if isinstance(value, (list, tuple)) else [value]) if path]


def prompts(source: Source) -> Iterator[Outcome]:
    """Yield how prompts are read: verl renders chats, always."""
    yield own_way("data.chat_template", True, "verl renders every prompt")
    yield from long_prompts(source, "data")
    yield own_way("data.deduplicate", False, "verl keeps repeated rows")


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


def images(source: Source) -> Iterator[Outcome]:
    """Yield the loss of a column of images or videos. Hydra's resolved configuration always has their default names, which say
    nothing: verl reads such a column only if the rows have it."""
    for key, default in COLUMNS.items():
        if _names_a_column(source, key):
            yield gone(NO_IMAGES, key, objective=True)
        elif source.gives(key):
            yield Outcome(
                "meaningless", (key,), note="no column of its own" if source[key] == default else "off, as here"
            )


def _names_a_column(source: Source, key: str) -> bool:
    return source[key] not in (None, "") and not (source.run.complete and source[key] == COLUMNS[key])


def vision_model(source: Source) -> Iterator[Outcome]:
    """Yield the loss of images where the model's name says that it reads them and no column of images is named."""
    key = "actor_rollout_ref.model.path"
    named = any(_names_a_column(source, column) for column in COLUMNS if source.is_known(column))
    if source.plain_path(key) and _VISION.search(str(source.path(key) or "")) and not named:
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
    yield from _template_kwargs(source, "data")


def _template_kwargs(source: Source, section: str) -> Iterator[Outcome]:
    place = "data.apply_chat_template_kwargs"
    for key, value in {**(source[place] or {}), **source.below(place)}.items():
        whole = f"{place}.{key}" if source.gives(f"{place}.{key}") else place
        yield Outcome("same", (whole,), f"{section}.chat_template_kwargs", {key: value})


def limit(source: Source) -> Iterator[Outcome]:
    """Yield the number of training rows; -1 is all."""
    yield from _limit(source, "data.train_max_samples", "data.limit")


def _limit(source: Source, key: str, ours: str) -> Iterator[Outcome]:
    rows = source[key]
    if rows is not None and rows > 0:
        note = (
            "rows, here the first ones; verl draws them at random with data.shuffle"
            if source["data.shuffle"]
            else "rows"
        )
        yield Outcome("converted", (key,), ours, rows, note)
    elif source.gives(key):
        yield Outcome("converted", (key,), ours, None, "all rows")


def evaluation(source: Source) -> Iterator[Outcome]:
    """Yield the evaluation sets, one a file, and when they are evaluated. Sets that the script does not name are one question."""
    apart = is_fully_async(source.run)
    every, first, key = (
        "rollout.test_freq" if apart else "trainer.test_freq",
        "trainer.val_before_train",
        "data.val_files",
    )
    often = source[every] is not None and source[every] > 0
    known = source.is_known(key) or source.plain_path(key)
    if (known and not as_list(source.path(key))) or not (often or source[first]):
        for name in (key, every, first):
            if source.gives(name):
                yield Outcome("meaningless", (name,), note="nothing is evaluated")
        return
    note = "never but at the start and after the last step"
    if often:
        note = "hand-overs of weights there, rollout steps here" if apart else ""
    yield became(source, "eval.every", source[every] if often else None, every, note=note)
    yield became(source, "eval.at_start", bool(source[first]), first)
    if not known:
        yield asked(
            "eval.sets", "the script takes the files from outside; a named set per file: {aime24: {files: [FILE]}}", key
        )
    else:
        paths = as_list(source.path(key))
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
    yield own_way(f"{place}.chat_template", True, "verl renders every prompt")
    yield from _template_kwargs(source, place)
    yield own_way(f"{place}.deduplicate", False, "verl keeps repeated rows")
    yield from (line for line in long_prompts(source, place) if line.ours)
    yield from _limit(source, "data.val_max_samples", f"{place}.limit")


def top_k(k: int) -> int:
    """Return our top_k: verl writes all tokens as -1, or as 0 for its own engine."""
    return k if k > 0 else -1


def _sampling(source: Source) -> Iterator[Outcome]:
    """Yield how evaluation samples. do_sample=False with a temperature was greedy once, and is not at b178a3c."""
    place = f"{_ROLLOUT}.val_kwargs"
    old = {"n": f"{_ROLLOUT}.n_val", "temperature": f"{_ROLLOUT}.val_temperature"}
    for name, ours in {"n": "samples_per_prompt", "top_p": "top_p", "top_k": "top_k"}.items():
        key = source.first(f"{place}.{name}", old.get(name, f"{place}.{name}"))
        yield became(source, f"eval.{ours}", top_k(source[key]) if name == "top_k" else source[key], key)
    warm, sample = source.first(f"{place}.temperature", old["temperature"]), f"{place}.do_sample"
    if source[warm] and not source[sample] and warm not in old.values():
        note = f"0 if the script's verl takes do_sample=False for greedy (before its agent loop), {source[warm]:g} at b178a3c"
        yield asked("eval.temperature", note, sample if source.gives(sample) else warm, warm)
    else:
        yield became(source, "eval.temperature", source[warm], warm)
        if source.gives(sample):
            yield Outcome("meaningless", (sample,), note="the temperature says it")


def _set_names(paths: list[str]) -> list[str]:
    """Return a name per file: its own without the ending, numbered if several have it; its folder's if it is named test, unless
    that says nothing either."""
    names: list[str] = []
    for path in map(PurePosixPath, paths):
        folder = path.parent.name.lower()
        of_folder = path.stem in ("test", "val", "validation", "train") and folder not in (
            "",
            "data",
            "dataset",
            "datasets",
        )
        stem = path.parent.name if of_folder else path.stem
        clean = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-") or "set"
        names.append(clean if clean not in names else f"{clean}_{len(names) + 1}")
    return names
