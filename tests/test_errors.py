"""Messages for users: what the operating system refuses, lists of values, and long texts."""

from __future__ import annotations

import errno
import os

import pytest

from dapo_mcore.errors import (
    REFUSALS,
    DapoError,
    OutputError,
    describe_error,
    listed,
    one_line,
    output_error,
    shortened,
)


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
def test_a_refusal_of_the_operating_system_says_what_was_done_and_what_to_do(number: int) -> None:
    found = output_error(OSError(number, os.strerror(number), "runs/a/metrics.jsonl"), "save the metrics")
    assert isinstance(found, OutputError) and isinstance(found, DapoError)
    assert str(found) == f"cannot save the metrics: {os.strerror(number)}: runs/a/metrics.jsonl; {REFUSALS[number]}"


def test_a_full_disk_without_a_file_name_is_told_without_one() -> None:
    found = output_error(OSError(errno.ENOSPC, "No space left on device"), "go on")
    told = "cannot go on: No space left on device; free some space there, or choose another output_dir"
    assert str(found) == told


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "reset"), OSError("no number")])
def test_any_other_error_of_the_system_stays_itself(error: OSError) -> None:
    assert output_error(error, "go on") is error


def test_values_are_listed_as_in_a_sentence() -> None:
    assert [listed(values) for values in ([1], [1, 2], [1, 2, 4])] == ["1", "1 or 2", "1, 2 or 4"]


def test_a_long_text_is_cut_and_says_so() -> None:
    assert shortened("x" * 80) == "x" * 80
    assert shortened("x" * 81) == "x" * 80 + "…"
    assert shortened("abc", 2) == "ab…"


def test_an_error_is_described_in_one_line_of_bounded_length():
    assert describe_error(ValueError("a\n  b")) == "ValueError: a b"
    assert describe_error(KeyError()) == "KeyError"
    assert describe_error(ValueError("x" * 5000)) == "ValueError: " + "x" * (1000 - len("ValueError: "))


def test_a_message_of_several_lines_becomes_one_and_an_empty_one_the_errors_type() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyError()) == "KeyError"
    assert one_line([1, 2], 4) == "[1, …"
