"""The built-in tool `calculator`: sums with the usual signs and some functions, without eval.

Change here: another operation, with a bound on its cost.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import sys
from collections.abc import Callable

DESCRIPTION = "Compute an arithmetic expression, for example (3 + 4) * 2 ** 10 / sqrt(2)."
PARAMETERS = {
    "type": "object",
    "properties": {"expression": {"type": "string", "description": "the expression, in Python's notation"}},
    "required": ["expression"],
    "additionalProperties": False,
}
_LONGEST = 1000
_MOST_BITS = 10_000
"""Of an integer. Python prints at most 4,300 decimal digits, which are 14,284 bits."""
_MOST_TOLD = 10**12
"""The error of 9 ** 9 ** 9 ** 3 must not be as long as its exponent."""

_INFINITE = f"the number would be beyond {sys.float_info.max:.4g}, the largest with a decimal point"
_COMMA = re.compile(r"\d,\d{3}")
"""As in 1,000, which Python reads as two numbers."""

_BINARY: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable] = {
    "abs": abs, "ceil": math.ceil, "cos": math.cos, "exp": math.exp, "floor": math.floor, "gcd": math.gcd, "log": math.log,
    "log10": math.log10, "log2": math.log2, "max": max, "min": min, "round": round, "sin": math.sin, "sqrt": math.sqrt,
    "tan": math.tan,
}  # fmt: skip
_CONSTANTS = {"pi": math.pi, "e": math.e}


def calculate(expression: str) -> str:
    """Return the value as text; an integer stays one. Raise ValueError or ArithmeticError for what cannot be computed."""
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters; at most {_LONGEST} are allowed")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
        if any(isinstance(node, ast.Tuple) for node in ast.walk(tree)):
            raise SyntaxError("these are several numbers")
    except (SyntaxError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        comma = "; a comma is no part of a number" if _COMMA.search(expression) else ""
        raise ValueError(f"{expression!r:.80} is no arithmetic expression: {reason}{comma}") from None
    try:
        return str(_value(tree.body))
    except RecursionError:
        raise ValueError("the expression is nested too deeply") from None


def _value(node: ast.AST) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _bounded(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_value(node.left), _value(node.right))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and not node.keywords
    ):
        return _bounded(_FUNCTIONS[node.func.id](*[_value(argument) for argument in node.args]))
    raise ValueError(
        f"{ast.unparse(node)!r:.80} is not arithmetic; allowed are numbers, + - * / // % **, parentheses, "
        f"{', '.join(_CONSTANTS)} and {', '.join(_FUNCTIONS)}"
    )


def _power(base: int | float, exponent: int | float) -> int | float:
    """Return base ** exponent. An integer that must become too large is refused before it is computed."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0 and abs(base) > 1:
        least = (base.bit_length() - 1) * exponent + 1
        _check_bits(min(least, _MOST_TOLD), "at least ")
    try:
        result = base**exponent
    except OverflowError:  # of a float, with a message from C
        raise OverflowError(_INFINITE) from None
    if isinstance(result, complex):
        raise ValueError(f"{base} ** {exponent} is no real number")
    return _bounded(result)


def _bounded(number: int | float) -> int | float:
    if isinstance(number, int):
        _check_bits(number.bit_length())
    elif not math.isfinite(number):
        raise OverflowError(_INFINITE)
    return number


def _check_bits(bits: int, least: str = "") -> None:
    if bits > _MOST_BITS:
        raise OverflowError(f"the number would have {least}{bits} bits; at most {_MOST_BITS} are allowed")
