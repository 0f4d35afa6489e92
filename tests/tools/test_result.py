"""What is kept of a long output."""

from __future__ import annotations

import pytest

from dapo_mcore.tools.result import clip


@pytest.mark.parametrize(
    ("text", "most", "missing", "kept"),
    [
        ("abcd", 4, 0, "abcd"),
        ("abcde", 4, 0, "ab\n[1 characters left out]\nde"),
        ("abcde", 3, 0, "ab\n[2 characters left out]\ne"),
        ("abcdef", 4, 100, "ab\n[102 characters left out]\nef"),
        ("abcd", 4, 7, "ab\n[7 characters left out]\ncd"),
        ("abc", 1, 0, "a\n[2 characters left out]\n"),
    ],
)
def test_a_long_text_loses_its_middle(text: str, most: int, missing: int, kept: str):
    assert clip(text, most, missing) == kept
