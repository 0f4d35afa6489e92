"""Rules of NeMo-RL's table about prompts: files, the text around them, their lengths, and what is evaluated.

Change here: how NeMo-RL's data sets become our files, and a data set that it knows by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter
from typing import Any, NamedTuple

from dapo_mcore.foreign.read.nemo import text_beside
from dapo_mcore.foreign.table import Outcome, Source, asked, became, gone, own_way

_GENERATION = "policy.generation"


class DataSet(NamedTuple):
    """A data set that NeMo-RL knows by name, as our keys. is_chat: its prompts are chats, into which no template goes."""

    files: tuple[str, ...]
    prompt_key: str
    answer_key: str
    answer_pattern: str | None = None
    is_chat: bool = False


_DAPO = ("prompt", "reward_model.ground_truth", None, True)
_GSM8K = DataSet(("hf://openai/gsm8k/main:{split}",), "question", "answer", "#### (.+)")
DATA_SETS = {
    "DAPOMath17K": DataSet(("hf://BytedTsinghua-SIA/DAPO-Math-17k:train",), *_DAPO),
    "DAPOMathAIME2024": DataSet(("hf://BytedTsinghua-SIA/AIME-2024:train",), *_DAPO),
    "DeepScaler": DataSet(("hf://agentica-org/DeepScaleR-Preview-Dataset:train",), "problem", "answer"),
    "OpenMathInstruct-2": DataSet(("hf://nvidia/OpenMathInstruct-2:{split}",), "problem", "expected_answer"),
    "gsm8k": _GSM8K,
    "GSM8K": _GSM8K,
    "AIME2024": DataSet(("hf://HuggingFaceH4/aime_2024:train",), "problem", "answer"),
    "AIME2025": DataSet(
        ("hf://opencompass/AIME2025/AIME2025-I:test", "hf://opencompass/AIME2025/AIME2025-II:test"),
        "question",
        "answer",
    ),
    "AIME2026": DataSet(("hf://MathArena/aime_2026:train",), "problem", "answer"),
}
"""NeMo-RL 7ea279a, nemo_rl/data/datasets/response_datasets/*.py."""
_SPLITS = {"OpenMathInstruct-2": "train_1M"}
_FILES = (".arrow", ".csv", ".json", ".jsonl", ".parquet")


def lengths(source: Source) -> Iterator[Outcome]:
    """Yield the limits of prompts and responses: there, a limit of both together holds, too."""
    prompt, response, whole = (
        "data.max_input_seq_length",
        f"{_GENERATION}.max_new_tokens",
        "policy.max_total_sequence_length",
    )
    places = ["data", *(["eval.sets.validation"] if is_evaluated(source) else [])]
    if source[prompt] is None or source[prompt] >= source[whole]:
        note = f"there prompts and responses share {source[whole]} tokens; here each has a limit"
        free = source[whole] - source[response]
        note += f": {free} leave each prompt its response" if free > 0 else ""
        yield asked("data.max_prompt_tokens", note, whole)
        for place in places[1:]:
            yield asked(f"{place}.max_prompt_tokens", "as data.max_prompt_tokens", whole)
        if free > 0:
            yield became(source, "rollout.max_response_tokens", source[response], response)
        else:
            yield asked("rollout.max_response_tokens", f"the rest of {source[whole]} tokens", whole)
        return
    for place in places:
        yield became(source, f"{place}.max_prompt_tokens", source[prompt], prompt)
        note = "longer ones are left out of the loss there"
        yield Outcome("converted", (prompt,), f"{place}.on_long_prompt", "drop", note)
    left = min(source[response], source[whole] - source[prompt])
    note = (
        "" if left == source[response] else f"what max_total_sequence_length {source[whole]} leaves the longest prompt"
    )
    yield became(source, "rollout.max_response_tokens", left, *((response, whole) if note else (response,)), note=note)


def data(source: Source) -> Iterator[Outcome]:
    """Yield the training data."""
    several = [key for key in ("data.custom_dataloader", "data.train") if source.gives(key) and source[key]]
    several += ["data.use_multiple_dataloader"] if source["data.use_multiple_dataloader"] else []
    if several:
        what = "a list of data sets" if several[0] == "data.train" else "a loader of the user's own"
        yield asked("data.files", f"the prompts come from {what}; name the files, mixed as they are to be", *several)
    else:
        yield from _rows(source, "train", "data")
    yield from _rendering(source, "train", "data")


def _rows(source: Source, part: str, place: str) -> Iterator[Outcome]:
    """Yield the files of a part and their columns."""
    path, name = f"data.{part}.data_path", f"data.{part}.dataset_name"
    known = _known(source, part)
    if source.path(path):
        yield Outcome("converted", (path,), f"{place}.files", [_file(source, part, str(source.path(path)))], "a list")
    elif known:
        split = source[f"data.{part}.split"] or _SPLITS.get(source[name], "train")
        used = (name, f"data.{part}.split") if source.gives(f"data.{part}.split") else (name,)
        files = [file.format(split=split) for file in known.files]
        yield Outcome("converted", used, f"{place}.files", files, "where NeMo-RL loads it from")
    else:
        note = f"NeMo-RL loads {source[name] or 'its own data set'} by name; name its files, or hf://org/name:split"
        yield asked(f"{place}.files", note, name if source.gives(name) else path)
    yield from _columns(source, part, place)


def _known(source: Source, part: str) -> DataSet | None:
    """Return the data set of a part that NeMo-RL knows by name."""
    return None if source.path(f"data.{part}.data_path") else DATA_SETS.get(str(source[f"data.{part}.dataset_name"]))


def _columns(source: Source, part: str, place: str) -> Iterator[Outcome]:
    """Yield the columns of prompts and answers."""
    name, known = f"data.{part}.dataset_name", _known(source, part)
    if known:
        yield Outcome("converted", (name,), f"{place}.prompt_key", known.prompt_key, "its column")
        answer = f"data.{part}.output_key"
        own = source[answer] if source.gives(answer) and "OpenMath" in source[name] else None
        yield Outcome(
            "converted", (answer if own else name,), f"{place}.answer_key", own or known.answer_key, "its column"
        )
        if known.answer_pattern:
            yield Outcome("converted", (name,), f"{place}.answer_pattern", known.answer_pattern, "the answer after it")
    elif source.path(f"data.{part}.data_path"):
        for key, ours, default in (("input_key", "prompt_key", "input"), ("output_key", "answer_key", "output")):
            used = _key(source, part, key)
            kind: Any = "same" if source.gives(used) else "converted"
            yield Outcome(
                kind, (used,), f"{place}.{ours}", source[used] or default, "" if source.gives(used) else "its default"
            )


def _file(source: Source, part: str, path: str) -> str:
    """Return a path, or hf://org/name:split for a name of the hub, which NeMo-RL takes where a path has no file's ending."""
    if path.endswith((*_FILES, ".txt")) or path.startswith((".", "/", "~", "$")) or path.count("/") != 1:
        return path
    subset, split = source[f"data.{part}.subset"], source[f"data.{part}.split"] or "train"
    return f"hf://{path}{f'/{subset}' if subset else ''}:{split}"


def _key(source: Source, part: str, name: str) -> str:
    """Return the key that says something about a part: its own, or that of `data.default`."""
    own = f"data.{part}.{name}"
    return own if source.gives(own) else f"data.default.{name}"


def _rendering(source: Source, part: str, place: str) -> Iterator[Outcome]:
    """Yield how prompts become text: the template of the chat, and the texts of files before and around them."""
    template, kwargs = "policy.tokenizer.chat_template", source["policy.tokenizer.chat_template_kwargs"]
    chat: Any = True
    if source.gives(template):
        named = source.path(template)
        chat = False if named is None else True if str(named).lower() == "default" else named
    if isinstance(chat, str) and not chat.endswith(".jinja"):
        yield gone("a template as a text; nearest: a Jinja file named by data.chat_template", template, objective=True)
        chat = True
    note = "NeMo-RL renders every prompt" if chat is True else "null: no template there" if chat is False else ""
    if source.gives(template):
        yield Outcome("converted", (template,), f"{place}.chat_template", chat, note)
    else:
        yield own_way(f"{place}.chat_template", chat, note)
    yield own_way(f"{place}.deduplicate", False, "NeMo-RL keeps repeated rows")
    if kwargs or source.below("policy.tokenizer.chat_template_kwargs"):
        yield from _template_kwargs(source, place)
    yield from _text_around(source, part, place)
    yield from _system_prompt(source, part, place, chat is not False)
    kind = _key(source, part, "processor")
    if source[kind] not in (None, "default", "math_hf_data_processor"):
        yield gone(f"rows are read by {source[kind]}; nearest: rows with a prompt and an answer", kind, objective=True)


def _template_kwargs(source: Source, place: str) -> Iterator[Outcome]:
    key = "policy.tokenizer.chat_template_kwargs"
    for name, value in {**(source[key] or {}), **source.below(key)}.items():
        used = key if source.gives(key) else f"{key}.{name}"
        yield Outcome("same", (used,), f"{place}.chat_template_kwargs", {name: value})


def _text_around(source: Source, part: str, place: str) -> Iterator[Outcome]:
    """Yield the text around each prompt, which is in a file with `{}` in the prompt's place."""
    key = _key(source, part, "prompt_file")
    if source[key] is None:
        if source.gives(key):
            yield Outcome("meaningless", (key,), note="no text around prompts, as here")
        return
    known = _known(source, part)
    if known and known.is_chat:
        yield gone(
            f"the text of {source[key]} around prompts that are chats; nearest: write it into the rows",
            key,
            objective=True,
        )
        return
    template = _template(text_beside(source.run.file, str(source[key])))
    if template is None:
        note = f"the text of {source[key]} around each prompt, with {{prompt}} where it has {{}}, and one brace where it has two"
        yield asked(f"{place}.prompt_template", f"{note}; import it beside that file to have it filled in", key)
    else:
        yield Outcome("converted", (key,), f"{place}.prompt_template", template, "the text of that file")


def _template(text: str | None) -> str | None:
    """Return our template for a text of str.format; None if there is none, or it has another place than `{}`."""
    try:
        parts = list(Formatter().parse(text or ""))
    except ValueError:
        return None
    fields = [(field, spec, how) for _, field, spec, how in parts if field is not None]
    literal = "".join(words for words, *_ in parts)
    if len(fields) != 1 or fields[0] not in (("", "", None), ("0", "", None)) or "{prompt}" in literal:
        return None
    return "".join(words + ("{prompt}" if field is not None else "") for words, field, *_ in parts)


def _system_prompt(source: Source, part: str, place: str, is_chat: bool) -> Iterator[Outcome]:
    key = _key(source, part, "system_prompt_file")
    if source[key] is None:
        if source.gives(key):
            yield Outcome("meaningless", (key,), note="no system prompt, as here")
        return
    text = text_beside(source.run.file, str(source[key]))
    if not is_chat:
        yield gone("a system prompt without a chat template; nearest: data.prompt_template", key, objective=True)
    elif text:
        yield Outcome("converted", (key,), f"{place}.system_prompt", text, "the text of that file")
    else:
        yield asked(f"{place}.system_prompt", f"the text of {source[key]}", key)


def is_evaluated(source: Source) -> bool:
    """Return True if the run evaluates something: at its start, or in between."""
    named = ("data.validation", "data.validation.data_path", "data.validation.dataset_name")
    rows = any(source.gives(key) and source.path(key) for key in named) or _held_out(source)
    return rows and ((source["grpo.val_period"] or 0) > 0 or bool(source["grpo.val_at_start"]))


def evaluation(source: Source) -> Iterator[Outcome]:
    """Yield the evaluation set and when it is evaluated."""
    path, name, every, start = (
        "data.validation.data_path",
        "data.validation.dataset_name",
        "grpo.val_period",
        "grpo.val_at_start",
    )
    several = source.gives("data.validation") and bool(source["data.validation"])
    named, held_out = source.path(path) or source[name] or several, _held_out(source)
    period = source[every] or 0
    if not is_evaluated(source):
        for key in (path, name, every, "grpo.max_val_samples", "data.train.split_validation_size"):
            if source.gives(key):
                yield Outcome("meaningless", (key,), note="nothing is evaluated")
        return
    yield became(source, "eval.every", period if period > 0 else None, every, note="" if period > 0 else "never")
    yield became(source, "eval.at_start", bool(source[start]), start)
    place = "eval.sets.validation"
    if held_out:
        key = "data.train.split_validation_size"
        what = f"{source[key]} of the training rows are held out there, for evaluation; write them, and the rest, to files of their own"
        yield gone(what, key) if named else asked(f"{place}.files", what, key)
    if not named:
        yield from _columns(source, "train", place)
    elif several:
        yield asked(f"{place}.files", "a list of data sets; name their files, or write one set each", "data.validation")
    else:
        yield from _rows(source, "validation", place)
    yield from _limit(source, place)
    yield from _rendering(source, "validation", place)
    yield from _eval_samples(source)


def _held_out(source: Source) -> bool:
    """Return True if a part of the training rows is held out: most data sets that NeMo-RL knows by name leave that undone."""
    name = source["data.train.dataset_name"]
    splits = source.path("data.train.data_path") or name == "OpenMathInstruct-2" or name not in DATA_SETS
    return (
        bool(name or source.path("data.train.data_path"))
        and bool(splits)
        and bool(source["data.train.split_validation_size"])
    )


def _limit(source: Source, place: str) -> Iterator[Outcome]:
    """Yield the number of rows: NeMo-RL takes whole batches alone."""
    most, size = "grpo.max_val_samples", "grpo.val_batch_size"
    if source[most] is None:
        return
    batch = source[size] or source[most]
    rows = source[most] // batch * batch or source[most]
    note = "rows" if rows == source[most] else f"rows: {source[most]} // {batch} whole batches"
    yield Outcome("converted", (most, size) if source.gives(size) else (most,), f"{place}.limit", rows, note)


def _eval_samples(source: Source) -> Iterator[Outcome]:
    samples, times = "grpo.val_num_generations_per_prompt", "data.validation.repeat"
    if source[times] and source[times] > 1:
        note = f"rows are repeated {source[times]} times"
        yield became(source, "eval.samples_per_prompt", source[samples] * source[times], times, note=note)
    else:
        yield became(source, "eval.samples_per_prompt", source[samples], samples)
    for ours in ("temperature", "top_p", "top_k"):
        own, train = f"{_GENERATION}.val_{ours}", f"{_GENERATION}.{ours}"
        used = own if source.gives(own) else train
        value = source[used] if source[used] is not None else -1
        yield became(source, f"eval.{ours}", value, used, note="" if used == own else "as in training")
