"""Makes the quickstart's task: two-digit addition, a tiny Qwen2 architecture and a character tokenizer.

    python examples/arithmetic.py [--out runs/arithmetic] [--seed 0]

Change here: the task, the styles of the demonstrations, the size of the model. Every file depends on the seed alone.
A worked answer adds the units first, the third number is the carry: `66+20=` -> `6+0+0=6;6+2+0=8;Answer:86`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
ANSWER = "Answer:"
CHARACTERS = "0123456789+-=; "
VOCAB_SIZE = 32
NUM_HELD_OUT = 128
NUM_DEMONSTRATIONS = 40_000
NUM_MIXED = 4_000
STYLES = {"direct": 0.5, "steps": 0.3, "rambling": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/arithmetic"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write_task(options.out, options.seed))


def write_task(out: Path, seed: int) -> str:
    """One line saying what was written: the model folder, three disjoint prompt sets, the demonstrations, and training prompts
    of which most are too easy or hopeless."""
    write_model(out / "model")
    splits = split_problems()
    rng = random.Random(seed)
    rows = {name: [problem_row(*problem) for problem in problems] for name, problems in splits.items()}
    rows["choose"] = rng.sample(rows["choose"], NUM_HELD_OUT)
    rows["heldout"] = rng.sample(rows["heldout"], NUM_HELD_OUT)
    rows["demonstrations"] = [demonstration(rng, *rng.choice(splits["train"])) for _ in range(NUM_DEMONSTRATIONS)]
    rows["mixed"] = mixed_rows(random.Random(seed), splits["train"])
    for name, content in rows.items():
        write_jsonl(out / f"{name}.jsonl", content)
    counts = ", ".join(f"{name}.jsonl ({len(content)} rows)" for name, content in rows.items())
    return f"wrote {out}: model/, {counts}"


def split_problems(sign: str = "+") -> dict[str, list[tuple[int, int]]]:
    """Every pair of two-digit numbers, in the split that a hash of its prompt names: a tenth choose, a tenth heldout."""
    splits: dict[str, list[tuple[int, int]]] = {"train": [], "choose": [], "heldout": []}
    for a in range(10, 100):
        for b in range(10, 100):
            digest = int(hashlib.md5(prompt_of(a, b, sign).encode()).hexdigest(), 16)
            splits[{0: "heldout", 1: "choose"}.get(digest % 10, "train")].append((a, b))
    return splits


def prompt_of(a: int, b: int, sign: str = "+") -> str:
    return f"{a}{sign}{b}="


def problem_row(a: int, b: int) -> dict[str, str]:
    return {"prompt": prompt_of(a, b), "answer": str(a + b)}


def addition_steps(a: int, b: int) -> list[str]:
    """The column sums, units first. Example: 67+58 -> ["7+8+0=15;", "6+5+1=12;"]."""
    steps, carry = [], 0
    for digit_a, digit_b in zip(reversed(str(a)), reversed(str(b))):
        total = int(digit_a) + int(digit_b) + carry
        steps.append(f"{digit_a}+{digit_b}+{carry}={total};")
        carry = total // 10
    return steps


def demonstration(rng: random.Random, a: int, b: int) -> dict[str, str]:
    """A right response in a style drawn by STYLES: no steps, each step once, or each step two or three times."""
    (style,) = rng.choices(list(STYLES), weights=list(STYLES.values()))
    repeats = {"direct": (0, 0), "steps": (1, 1), "rambling": (2, 3)}[style]
    steps = "".join(step * rng.randint(*repeats) for step in addition_steps(a, b))
    return {"prompt": prompt_of(a, b), "response": f"{steps}{ANSWER}{a + b}"}


def mixed_rows(rng: random.Random, problems: list[tuple[int, int]]) -> list[dict[str, str]]:
    """Distinct training prompts: a quarter problems, a quarter with all steps in the prompt, half sums of five-digit numbers,
    of which the demonstrations show none. Example of the second kind: `66+20=6+0+0=6;6+2+0=8;`."""
    chosen = rng.sample(problems, NUM_MIXED // 2)
    plain, solved = chosen[: NUM_MIXED // 4], chosen[NUM_MIXED // 4 :]
    easy = [{"prompt": prompt_of(a, b) + "".join(addition_steps(a, b)), "answer": str(a + b)} for a, b in solved]
    large = rng.sample(range(10_000, 100_000), NUM_MIXED)
    hopeless = [problem_row(a, b) for a, b in zip(large[::2], large[1::2])]
    return [problem_row(*problem) for problem in plain] + easy + hopeless


def write_model(folder: Path, words: Sequence[str] = (ANSWER,), characters: str = CHARACTERS) -> None:
    """Config and tokenizer of a Qwen2 model with 125,504 parameters; no weights, the run draws them."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    architecture = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "dtype": "float32",
        **special,
    }
    write_json(folder / "config.json", architecture)
    write_json(folder / "generation_config.json", special)
    character_tokenizer(words, characters).save(str(folder / "tokenizer.json"))
    names = {"eos_token": EOS, "bos_token": BOS, "pad_token": PAD, "unk_token": None}
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 512, **names}
    )


def character_tokenizer(words: Sequence[str] = (ANSWER,), characters: str = CHARACTERS) -> Tokenizer:
    """One token a character, and one for each of the words, such as `Answer:`: byte-level BPE without merges.

    The parts are those that transformers' Qwen2Tokenizer builds by itself, so both read a text the same way.
    """
    symbols = [PAD, EOS, BOS, *words, *characters.replace(" ", "Ġ")]  # byte-level BPE spells a space Ġ
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS, BOS])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
