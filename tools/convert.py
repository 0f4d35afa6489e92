#!/usr/bin/env python3
"""Converts checkpoints between Hugging Face folders and Megatron's distributed checkpoints, bit for bit.

    tools/convert.py hf-to-mcore Qwen2.5-32B qwen-mcore --tensor-parallel 8 --pipeline-parallel 2
    tools/convert.py mcore-to-hf runs/NAME/checkpoints/step_000100 qwen-trained
    tools/convert.py verify Qwen2.5-32B qwen-mcore
    tools/convert.py inspect qwen-mcore

No GPU is needed, and memory for about one tensor. An interrupted conversion continues when it is started again.
Training takes either kind of folder as model.path, in any layout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

# torch takes large pages for large tensors: reading into fresh memory is twice as fast
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# a bare checkout works, too
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dapo_mcore.errors import DapoError
from dapo_mcore.observe.byte_progress import ByteProgress
from dapo_mcore.process import environment  # noqa: F401  (first: it sets what later imports read)


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand. Return 0 for done, 1 if the folders differ, 2 for wrong input or arguments."""
    parsed = build_parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (DapoError, OSError) as error:
        print(f"{parsed.command}: {error}", file=sys.stderr)
        return 2


def hf_to_mcore(arguments: argparse.Namespace) -> int:
    from dapo_mcore.convert.convert import Cut, hf_to_mcore

    cut = Cut(
        arguments.tensor_parallel,
        arguments.pipeline_parallel,
        arguments.expert_parallel,
        arguments.expert_tensor_parallel,
    )
    with ByteProgress("hf-to-mcore") as report:
        hf_to_mcore(_folder(arguments.hf), arguments.out, cut, report)
    print(f"wrote {arguments.out}; train from it with model.path={arguments.out}")
    return 0


def mcore_to_hf(arguments: argparse.Namespace) -> int:
    from dapo_mcore.convert.convert import mcore_to_hf

    with ByteProgress("mcore-to-hf") as report:
        mcore_to_hf(arguments.mcore, arguments.out, report, int(arguments.shard_size * 1e9))
    print(f"wrote {arguments.out}, a folder for transformers and SGLang")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    from dapo_mcore.convert.verify import differences, manifest

    found = []
    arguments.first, arguments.second = _folder(arguments.first), _folder(arguments.second)
    for folder in (arguments.first, arguments.second):
        with ByteProgress(f"reading {folder}") as report:
            found.append(manifest(folder, report))
    if arguments.manifest:
        both = {str(arguments.first): found[0], str(arguments.second): found[1]}
        entries = {folder: {name: asdict(entry) for name, entry in own.items()} for folder, own in both.items()}
        arguments.manifest.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    lines = differences(*found)
    print(
        "\n".join(lines[:20] + ([f"… and {len(lines) - 20} more"] if len(lines) > 20 else [])) or "",
        end="\n" if lines else "",
    )
    print(
        f"{len(lines)} of {len(found[0])} tensors differ"
        if lines
        else f"the same: {len(found[0])} tensors, bit for bit"
    )
    return max(bool(lines), _compare_logits(arguments))


def _compare_logits(arguments: argparse.Namespace) -> int:
    """Return 1 if the logits on the text choose a different token anywhere, else 0."""
    if arguments.text is None:
        return 0
    from dapo_mcore.convert.verify import logits_on_text

    first, second = (logits_on_text(folder, arguments.text) for folder in (arguments.first, arguments.second))
    if first.shape != second.shape:
        print(f"logits: {list(first.shape)} and {list(second.shape)}: tokenizers or vocabularies differ")
        return 1
    same = int((first.argmax(-1) == second.argmax(-1)).sum())
    print(
        f"logits on {len(first)} tokens in float32: largest difference {(first - second).abs().max():.2e} "
        f"(largest logit {first.abs().max():.2e}), same best token at {same} of {len(first)}"
    )
    return int(same < len(first))


def inspect(arguments: argparse.Namespace) -> int:
    from dapo_mcore.convert.inspect import describe

    print(describe(_folder(arguments.folder), every_tensor=arguments.tensors))
    return 0


def _folder(path: Path) -> Path:
    """Return the folder itself, or the downloaded snapshot of a model on the hub, OWNER/NAME or OWNER/NAME@REVISION."""
    from dapo_mcore.config.model import ModelConfig
    from dapo_mcore.model_files.model_folder import hub_name, model_folder

    name, _, revision = str(path).partition("@")
    if path.exists() or hub_name(name) is None:
        return path
    return model_folder(ModelConfig(path=name, revision=revision or None), weights=True)


def build_parser() -> argparse.ArgumentParser:
    about, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(prog="convert.py", description=about, epilog=examples, formatter_class=_wide)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _command(commands, "hf-to-mcore", hf_to_mcore, "HF folder → Megatron checkpoint")
    command.add_argument(
        "hf",
        type=Path,
        metavar="HF_DIR",
        help="config.json, tokenizer files, *.safetensors; or a model on the hub, OWNER/NAME[@REVISION]",
    )
    command.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    note = "(the checkpoint loads in any layout; in this one each rank reads its own bytes only)"
    for axis, meaning in (
        ("tensor", f"ranks that a matrix is cut for {note}"),
        ("pipeline", "stages that files are grouped for"),
        ("expert", "ranks that the experts of a layer are spread over"),
        ("expert-tensor", "ranks that an expert's matrix is cut for"),
    ):
        command.add_argument(f"--{axis}-parallel", type=_positive, default=1, metavar="N", help=f"{meaning}; default 1")

    command = _command(commands, "mcore-to-hf", mcore_to_hf, "Megatron checkpoint → HF folder")
    command.add_argument(
        "mcore", type=Path, metavar="MCORE_DIR", help="what hf-to-mcore wrote, or a run's checkpoints/step_N"
    )
    command.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    command.add_argument(
        "--shard-size", type=_gigabytes, default=5.0, metavar="GB", help="largest file, in 10⁹ bytes; default 5"
    )

    command = _command(commands, "verify", verify, "compare two folders, of either kind, tensor by tensor")
    command.add_argument("first", type=Path, metavar="A", help="a Hugging Face or Megatron folder")
    command.add_argument("second", type=Path, metavar="B", help="another")
    command.add_argument("--text", help="also compare the logits on this text, in float32 (loads both models in turn)")
    command.add_argument(
        "--manifest", type=Path, metavar="FILE", help="write name, shape, dtype and SHA-256 of all tensors as JSON"
    )

    command = _command(commands, "inspect", inspect, "what a folder of either kind holds")
    command.add_argument("folder", type=Path, metavar="DIR", help="a Hugging Face or Megatron folder")
    command.add_argument("--tensors", action="store_true", help="list every tensor")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run, about: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=about, description=about, formatter_class=_wide)
    command.set_defaults(run=run)
    return command


def _wide(prog: str) -> argparse.HelpFormatter:
    """Room for the longest option beside its help."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _gigabytes(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a size above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
