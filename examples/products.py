"""Makes the task of tools_quickstart.yaml: products of two-digit numbers, which a tiny model cannot compute, and a calculator can.

    python examples/products.py [--out runs/products] [--seed 0]

Change here: how the demonstrations call the calculator, and how many of them do. Every file depends on the seed alone.
A demonstration guesses (`37*42=` -> `Answer:1554`) or asks the calculator and copies what it reads:
`<tool_call>{"name": "calculator", "arguments": {"expression": "37*42"}}</tool_call>`, `<tool_response>1554</tool_response>`, `Answer:1554`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from arithmetic import ANSWER, NUM_HELD_OUT, prompt_of, split_problems, write_jsonl, write_model

SIGN = "*"
CHARACTERS = "0123456789*=-. "
BEGIN, END = '<tool_call>{"name": "calculator", "arguments": {"expression": "', '"}}</tool_call>'
"""Of a call. Each is one token, as are the ends of a tool's output: the tiny model need not learn to spell them."""
READ_BEGIN, READ_END = "<tool_response>", "</tool_response>"
NUM_DEMONSTRATIONS = 40_000
CALLS = 0.4
"""Share of the demonstrations that call the calculator; the others show the right answer without a reason."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/products"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write_task(options.out, options.seed))


def write_task(out: Path, seed: int) -> str:
    """One line saying what was written: the model folder, three disjoint prompt sets and the demonstrations."""
    write_model(out / "model", (ANSWER, BEGIN, END, READ_BEGIN, READ_END), CHARACTERS)
    rng = random.Random(seed)
    splits = split_problems(SIGN)
    rows: dict[str, list[dict[str, Any]]] = {
        name: [{"prompt": prompt_of(a, b, SIGN), "answer": str(a * b)} for a, b in problems]
        for name, problems in splits.items()
    }
    rows["choose"] = rng.sample(rows["choose"], NUM_HELD_OUT)
    rows["heldout"] = rng.sample(rows["heldout"], NUM_HELD_OUT)
    rows["demonstrations"] = [demonstration(rng, *rng.choice(splits["train"])) for _ in range(NUM_DEMONSTRATIONS)]
    for name, content in rows.items():
        write_jsonl(out / f"{name}.jsonl", content)
    counts = ", ".join(f"{name}.jsonl ({len(content)} rows)" for name, content in rows.items())
    return f"wrote {out}: model/, {counts}"


def demonstration(rng: random.Random, a: int, b: int) -> dict[str, Any]:
    """A right response: the answer alone, or turns of policy, calculator and policy."""
    answer = f"{ANSWER}{a * b}"
    turns = [f"{BEGIN}{a}{SIGN}{b}{END}", f"{READ_BEGIN}{a * b}{READ_END}", answer]
    return {"prompt": prompt_of(a, b, SIGN), "response": turns if rng.random() < CALLS else answer}


if __name__ == "__main__":
    main()
