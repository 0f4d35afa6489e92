"""The built-in tool `calculator`: sums with the usual signs and some functions, without eval.

Change here: another operation, with a bound on its cost.
"""

from __future__ import annotations

import ast
import math
import operator
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
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r:.80} is no arithmetic expression: {error}") from None
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
    """Return base ** exponent. The size of an integer result is checked before it is computed."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        _check_bits(base.bit_length() * exponent)
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError(f"{base} ** {exponent} is no real number")
    return result


def _bounded(number: int | float) -> int | float:
    if isinstance(number, int):
        _check_bits(number.bit_length())
    return number


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise OverflowError(f"the number would have {bits} bits; at most {_MOST_BITS} are allowed")
