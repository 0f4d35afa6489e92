"""The rule for MATH against verl's, by hand: each expectation was checked with verl's math_reward.py at b178a3c."""

from __future__ import annotations

import pytest

from dapo_mcore.reward.math_boxed import compute_score, normal_form


@pytest.mark.parametrize(
    ("response", "truth", "pred", "right"),
    [
        (r"so $\boxed{12}$.", "12", "12", True),
        (r"\boxed{3}, no: \boxed{12}", "12", "12", True),
        (r"\boxed{\frac{1}{2}}", r"\dfrac12", r"\frac{1}{2}", True),
        (r"\boxed 7$ and more", "7", "7", True),
        (r"\boxed 7$, then \boxed{12}", "12", "7", False),  # a box with a space comes first, wherever it is
        (r"\boxed{12", "12", "[INVALID]", False),
        (r"\boxed{3} \boxed", "3", "[INVALID]", False),  # the last mark is no box
        (r"\fbox{12}", "12", "[INVALID]", False),
        ("Answer: 12", "12", "[INVALID]", False),
        (r"\boxed{}", "", "", True),
        (r"\boxed{\frac}", r"\frac", r"\frac", True),  # no normal form: the texts are compared
        (r"\boxed{\frac }", r"\frac", r"\frac ", False),
        (r"\boxed{x=5}", "5", "x=5", True),
        (r"\boxed{abc=5}", "5", "abc=5", False),  # a name has at most two characters
        (r"\boxed{0.25}", r"\frac{1}{4}", "0.25", False),
    ],
)
def test_the_last_box_is_compared_with_the_truth(response: str, truth: str, pred: str, right: bool):
    assert compute_score(response, truth) == {"score": float(right), "acc": right, "pred": pred}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (".5", r"\frac{1}{2}"),
        ("3/4", r"\frac{3}{4}"),
        ("-3/4", r"\frac{-3}{4}"),
        ("03/4", "03/4"),
        ("1/2/3", "1/2/3"),
        (r"\tfrac12 + \sqrt3", r"\frac{1}{2}+\sqrt{3}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{1}{2}\frac34", r"\frac{1}{2}\frac{3}{4}"),
        (r"\frac{1}{2}\frac3", r"\frac{1}{2}\frac3"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"10\text{ cm}", "10"),
        (r"10\text{cm}", r"10\text{cm}"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"20\%", "20"),
        (r"20\\%", "20"),
        (r"\$1\!000", "1000"),
        ("k = 3", "3"),
        ("x=y=3", "x=y=3"),
        ("a\nb", "ab"),
    ],
)
def test_the_normal_form_by_hand(text: str, normal: str):
    assert normal_form(text) == normal


@pytest.mark.parametrize("text", [r"\frac", r"\frac\frac12", r"\sqrt", r"\sqrt\sqrt2", r"1\text{ a}\text{ b}"])
def test_latex_that_breaks_off_has_no_normal_form(text: str):
    with pytest.raises(ValueError):
        normal_form(text)
