"""The math_dapo rule: which answer is found, its normal form, and the strict box."""

from __future__ import annotations

import random
import re

import pytest

from dapo_mcore.reward import math_answer
from dapo_mcore.reward.math_answer import compute_score, last_boxed, normalize_answer


@pytest.mark.parametrize(
    ("response", "truth", "pred"),
    [
        ("so 3+4.\nAnswer: 7", "7", "7"),
        ("answer : 7\n", "7", "7"),
        ("ANSWER:7", "7", "7"),
        ("Answer:\n\n7", "7", "7"),
        ("Answer: 6\nNo.\nAnswer: 7", "7", "7"),
        ("Answer: $7$", "7", "7"),
        ("Answer: \\boxed{7}", "7", "7"),
        ("Answer: $x = 7$", "7", "7"),
        ("Answer: 1,234", "1234", "1234"),
        ("Answer: 7 dollars", "7", "7"),
        ("Answer: \\frac12", "\\frac{1}{2}", "\\frac{1}{2}"),
    ],
)
def test_right_answers(response: str, truth: str, pred: str):
    assert compute_score(response, truth) == {"score": 1.0, "acc": True, "pred": pred}


@pytest.mark.parametrize(
    ("response", "truth", "pred"),
    [
        ("Answer: 8", "7", "8"),
        ("Answer: 7\nAnswer: 8", "7", "8"),
        ("Answer: 07", "7", "07"),
        ("Answer: 7.0", "7", "7.0"),
        ("7", "7", "[INVALID]"),
        ("", "7", "[INVALID]"),
        ("Answer:", "7", "[INVALID]"),
        ("nothing", "[INVALID]", "[INVALID]"),
        ("Answer: 7." + " " * 300, "7", "[INVALID]"),
    ],
)
def test_wrong_answers(response: str, truth: str, pred: str):
    assert compute_score(response, truth) == {"score": -1.0, "acc": False, "pred": pred}


def test_only_the_last_300_characters_count():
    answer = "Answer: 7"
    assert compute_score(answer + "\n" + "x" * (300 - len(answer) - 1), "7")["acc"]
    assert not compute_score(answer + "\n" + "x" * (300 - len(answer)), "7")["acc"]


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("a square", ""),
        ("an 8", "8"),
        ("x=y=3", "3"),
        ("12 cm", "12"),
        ("\\$18.90", "18.90"),
        ("5\\text{ m}", "5"),
        ("\\text{east}", "east"),
        ("\\textbf{B}", "B"),
        ("\\mbox{two}", "two"),
        ("90^\\circ", "90"),
        ("90^{\\circ}", "90"),
        ("4^\\mathrm{th}", "4^"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("\\sqrt{3}", "\\sqrt{3}"),
        ("\\frac ab", "\\frac{a}{b}"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\frac123", "\\frac{1}{2}3"),
        ("1{,}000", "1000"),
        ("12,345,678", "12345678"),
        ("1,2,x", "1,2,x"),
        ("(1, 2)", "(1,2)"),
        ("1\\text{ and }2", "12"),
        ("the value $5$ is", "5"),
        ("5.$", "5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\overline{AB}", "AB"),
        ("-3", "-3"),
    ],
)
def test_normal_forms(answer: str, normal: str):
    assert normalize_answer(answer) == normal


def test_the_ground_truth_is_normalized_too():
    assert compute_score("Answer: 1234", "1,234 dollars")["acc"]


@pytest.mark.parametrize(
    ("response", "truth", "acc", "pred"),
    [
        ("\\boxed{7}", "7", True, "7"),
        ("\\boxed{6} \\boxed{7}", "7", True, "7"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", True, "\\frac{1}{2}"),
        ("\\boxed{1,234}", "1234", False, "1,234"),
        ("\\boxed{7", "7", False, "[INVALID]"),
        ("Answer: 7", "7", False, "[INVALID]"),
        ("\\boxed{7}" + "x" * 91, "7", True, "7"),
        ("\\boxed{7}" + "x" * 92, "7", False, "[INVALID]"),
    ],
)
def test_the_strict_box_compares_literally(response: str, truth: str, acc: bool, pred: str):
    expected = {"score": 1.0 if acc else -1.0, "acc": acc, "pred": pred}
    assert compute_score(response, truth, strict_box_verify=True) == expected


def test_last_boxed():
    assert last_boxed("\\boxed{a{b}{c}}d}") == "a{b}{c}"
    assert last_boxed("no box") is None
    assert last_boxed("\\boxed{}") == ""


VERL_SUBSTITUTIONS = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"), (",\\text{and}", ","),
    ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
VERL_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points", "feet",
    "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)  # fmt: skip
VERL_REWRITES = (
    (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),
    (r"(\\text\{)(.*?)(\})", r"\2"),
    (r"(\\textbf\{)(.*?)(\})", r"\2"),
    (r"(\\overline\{)(.*?)(\})", r"\2"),
    (r"(\\boxed\{)(.*)(\})", r"\2"),
    (r"(frac)([^{])(.)", r"frac{\2}{\3}"),
    (r"(sqrt)([^{])", r"sqrt{\2}"),
)


def as_verl_normalizes(answer: str) -> str:
    """verl's normalize_final_answer, with its own tables and expressions (utils/reward_score/math_dapo.py)."""
    answer = answer.split("=")[-1]
    for before, after in VERL_SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for expression in VERL_REMOVED:
        answer = answer.replace(expression, "")
    for pattern, replacement in VERL_REWRITES:
        answer = re.sub(pattern, replacement, answer)
    answer = answer.replace("$", "")
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    return answer.strip()


def test_the_normal_form_is_verls_on_random_text():
    pieces = [
        "\\text{",
        "\\textbf{",
        "\\overline{",
        "\\boxed{",
        "{",
        "}",
        "$",
        "\n",
        "\r",
        "\\frac",
        "\\sqrt",
        "12",
        "x",
        ",",
    ]
    draw = random.Random(0)
    for _ in range(5_000):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 14)))
        assert normalize_answer(text) == as_verl_normalizes(text), text


@pytest.mark.parametrize(
    "piece", ["a", "$", "\\text{", "\\textbf{", "\\overline{", "\\boxed{", "x\n", "frac", "Answer "]
)
def test_a_long_text_of_any_kind_takes_linear_time(piece):
    """The expressions above take quadratic time: minutes for such a text."""
    assert compute_score("Answer: 7", piece * (200_000 // len(piece)))["acc"] is False


def test_a_truth_is_normalized_once(monkeypatch):
    asked = []
    monkeypatch.setattr(math_answer, "normalize_answer", lambda text: asked.append(text) or text)
    truth = "an answer that no other test has"
    assert [compute_score(f"Answer: {n}", truth)["acc"] for n in range(3)] == [False] * 3
    assert asked.count(truth) == 1


@pytest.mark.parametrize(
    ("response", "truth", "right"),
    [
        ("Answer: 1, 2", "12", True),
        ("Answer: 3 = 12", "12", True),
        ("**Answer: 18**", "18", False),
        ("Answer: \\(18\\)", "18", False),
        ("Answer: 18.0", "18", False),
    ],
)
def test_answers_that_the_papers_rule_gets_wrong_stay_wrong(response: str, truth: str, right: bool):
    """The rule stays as it was published. The module's docstring names these errors."""
    assert compute_score(response, truth)["acc"] is right
