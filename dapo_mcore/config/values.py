"""The types of the configuration's fields: what a name, a path, a text, a count or a time may be.

Change here: bounds that many fields share. They are far beyond any use and only catch typing errors.
"""

from __future__ import annotations

import os
import re
from types import NoneType
from typing import Annotated, Any, ClassVar, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

_LONGEST_NAME = 128
_LONGEST_PART = 255
_WORDS_FOR_NULL = ("none", "off")
_VARIABLE = re.compile(r"\$(?:\{(\w*)\}|(\w+))", re.ASCII)


class TwoUnits(NamedTuple):
    """Two keys of a section for one quantity, of which at most one is set.

    key      in the unit that the stages use; units.py fills it in if `other` is set.
    other    in another unit.
    default  of `key`, if neither is set.
    """

    key: str
    other: str
    default: int | None


class Section(BaseModel):
    """Base of every section: unknown keys, NaN and infinity fail, values cannot be changed after validation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )
    two_units: ClassVar[tuple[TwoUnits, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _take_one_unit(cls, values: Any) -> Any:
        for key, other, default in cls.two_units if isinstance(values, dict) else ():
            given = [values.get(name) for name in (key, other)]
            if None not in given:
                raise ValueError(
                    f"{key} {given[0]} and {other} {given[1]} set the same quantity in two units; keep one, and leave the other out "
                    "or null"
                )
            if given == [None, None] and default is not None:
                values = {**values, key: default}
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1, and YAML takes yes and on for true."""
        kinds = cls._kinds(info)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("true and false are no numbers; set a number")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_words_for_null(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML takes `none` for a text, which a text field would keep, and `off` for false."""
        kinds = cls._kinds(info)
        off = value.lower() in _WORDS_FOR_NULL if isinstance(value, str) else value is False and bool not in kinds
        if off and NoneType in kinds:
            raise ValueError("only null turns it off or leaves it unset")
        return value

    @classmethod
    def _kinds(cls, info: ValidationInfo) -> set[Any]:
        kind = cls.model_fields[str(info.field_name)].annotation
        return set(get_args(kind) or [kind])


class Prose:
    """Marks text for people or models, in which YAML's `#` and `{` are likely to be meant as they stand."""


def _checked_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) or len(value) > _LONGEST_NAME:
        raise ValueError(
            f"a name has 1 to {_LONGEST_NAME} letters, digits, dots, dashes and underscores, the first a letter or digit; "
            f"this one has {len(value)} characters"
        )
    return value


def _expanded(path: str) -> str:
    """Return the path with `~` and environment variables replaced, as a shell would. Raise ValueError for unknown ones."""
    names = [braced or bare for braced, bare in _VARIABLE.findall(path)]
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(f"the environment variable {missing[0]!r} is not set; set it, or write the path without it")
    full = os.path.expanduser(os.path.expandvars(path))
    if full.startswith("~"):
        raise ValueError(f"there is no user {full.split('/')[0][1:]!r} whose home folder ~ could mean")
    longest = max(len(part.encode(errors="replace")) for part in full.split("/"))
    if not full or "\0" in full or longest > _LONGEST_PART:
        raise ValueError(
            f"a path is not empty and its parts have at most {_LONGEST_PART} bytes; this one's longest part has {longest}"
        )
    return full


def _checked_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"this is no regular expression: {error}") from error
    if not groups:
        raise ValueError("this pattern has no group; put parentheses around the answer: '#### (.+)'")
    return pattern


def _checked_template(template: str) -> str:
    if "{prompt}" not in template:
        raise ValueError("this template does not contain {prompt}, the place of the row's prompt; add it")
    return template


def _checked_resume(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    is_step = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if is_step or value in ("auto", "never"):
        return value
    if isinstance(value, str) and "/" in value:
        return _expanded(value)
    raise ValueError(
        f"this is auto, never, the number of a rollout step, or the path of a checkpoint's folder with a '/' in it, not {value!r}"
    )


def _checked_top_k(value: int) -> int:
    if value == 0:
        raise ValueError("top_k 0 leaves no token to draw; use -1 for all of them, or at least 1")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Name = Annotated[str, AfterValidator(_checked_name)]
"""Names a folder, a file or a series of metrics."""
FilePath = Annotated[str, AfterValidator(_expanded)]
"""A file or folder; `~`, `$NAME` and `${NAME}` are replaced."""
FilePaths = Annotated[list[FilePath], Field(min_length=1), BeforeValidator(_listed)]
"""One path or several."""
ResumeChoice = Annotated[int | str, BeforeValidator(_checked_resume)]
"""`auto`, `never`, a rollout step, or the folder of a checkpoint."""
Text = Annotated[str, Prose]
AnswerPattern = Annotated[Text, AfterValidator(_checked_pattern)]
"""A regular expression with a group."""
PromptTemplate = Annotated[Text, AfterValidator(_checked_template)]
"""Text with a place for the prompt."""
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Tokens = Annotated[int, Field(ge=1, le=100_000_000)]
Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]
"""At most 30 days."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(gt=0, le=100)]
"""At 100 sampling is almost uniform."""
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1), AfterValidator(_checked_top_k)]
"""-1 for all tokens, or at least 1."""
