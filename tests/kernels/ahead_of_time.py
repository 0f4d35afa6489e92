"""Compile every Triton kernel for sm_90 without a GPU, with the arguments of production, and print a JSON line for each.

Change here: add a call per launch function of a new package, with every specialisation that production uses.
test_ahead_of_time.py runs this with TRITON_INTERPRET unset. It calls the launch functions of the packages on tensors
without memory, and a launch only compiles. So argument types, alignments and options are those of production.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from dapo_mcore.kernels.fp8_quant import kernel as fp8_quant
from dapo_mcore.kernels.policy_loss import Objective, TokenInputs
from dapo_mcore.kernels.policy_loss import kernel as policy_loss
from dapo_mcore.kernels.policy_loss.shard import VocabShard
from dapo_mcore.kernels.swiglu import kernel as swiglu
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

import dapo_mcore.kernels

TARGET = GPUTarget("cuda", 90, 32)
TOKENS, VOCABULARY = 4096, 152_064


class NoDevice:
    """Triton driver that names the target for compilation and has no device."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


class ShardOfOne(VocabShard):
    """Shard without the other ranks: its all-gather returns the right shape only."""

    def all_gather(self, statistics: torch.Tensor) -> torch.Tensor:
        return statistics.new_empty(self.num_ranks, *statistics.shape)


def token_inputs(*, old: bool = True, ref: bool = False, tis: bool = False, cov: bool = False) -> TokenInputs:
    one = meta(TOKENS)
    return TokenInputs(one, one, *(one if given else None for given in (old, ref, tis, cov)))


EVERYTHING = Objective(entropy_coef=0.01, dual_clip=10.0, kl_coef=0.1), token_inputs(ref=True, tis=True)
OBJECTIVES = {
    "DAPO": (Objective(), token_inputs()),
    "DAPO, dual clip, TIS": (Objective(dual_clip=10.0), token_inputs(tis=True)),
    "supervised": (Objective(), token_inputs(old=False)),
    "own old log-probs, dual clip, KL k3, TIS": (
        Objective(dual_clip=10.0, kl_coef=0.1),
        token_inputs(old=False, ref=True, tis=True),
    ),
    "entropy, KL k1": (Objective(entropy_coef=0.01, kl_coef=0.1, kl_estimator="k1"), token_inputs(ref=True)),
    "dual clip, KL k2": (Objective(dual_clip=10.0, kl_coef=0.1, kl_estimator="k2"), token_inputs(ref=True)),
    "CISPO, TIS": (Objective(form="cispo"), token_inputs(tis=True)),
    "KL-Cov, TIS": (Objective(1.0, 1e9), token_inputs(tis=True, cov=True)),
    "entropy, dual clip, KL k3, TIS": EVERYTHING,
}
# dtypes of logits and gradient: bf16 training, fp32 training, bf16 training with bf16 logits
DTYPES = ((torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
# columns of a rank, without padding, ranks: one rank; a shard of eight with padding; an odd width
COLUMNS = ((VOCABULARY, VOCABULARY, 1), (VOCABULARY // 8, VOCABULARY // 8 - 100, 8), (1003, 1001, 1))


def policy_loss_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    for name, (objective, tokens) in OBJECTIVES.items():
        yield name, partial(policy_loss.token_losses, meta(TOKENS), tokens, objective)
    for columns, real, ranks in COLUMNS:
        shard = ShardOfOne(0, real, None, ranks)
        for dtype, grad_dtype in DTYPES:
            full = columns == VOCABULARY and dtype != grad_dtype
            rows = (meta(TOKENS, columns, dtype=dtype), meta(TOKENS, dtype=torch.int64))
            case = f"{columns} columns of {ranks} ranks in {str(dtype)[6:]}"
            yield f"{case}: score", partial(policy_loss.score, *rows, shard, 0.7)
            for name, (objective, tokens) in (OBJECTIVES if full else {"everything": EVERYTHING}).items():
                call = partial(policy_loss.differentiate, *rows, tokens, objective, shard, 0.7, grad_dtype)
                yield f"{case}: gradient in {str(grad_dtype)[6:]}, {name}", call


def fp8_quant_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.float32, torch.bfloat16):
        for rows, columns in ((5120, 27_648), (100, 1003)):
            weight = meta(rows, columns, dtype=dtype)
            for rounding, hardware in {"": None, ", integer rounding": False}.items():
                case = f"{rows} x {columns} in {str(dtype)[6:]}{rounding}"
                yield case, partial(fp8_quant.quantize_blocks, weight, 128, hardware=hardware)
                yield case, partial(fp8_quant.quantize_rows, weight, hardware=hardware)


def swiglu_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.float32, torch.bfloat16):
        for width in (27_648, 768, 1_003):
            x, grad = meta(TOKENS, 2 * width, dtype=dtype), meta(TOKENS, width, dtype=dtype)
            for name, weights in {"": None, ", weighted": meta(TOKENS, 1)}.items():
                case = f"width {width} in {str(dtype)[6:]}{name}"
                yield case, partial(swiglu.forward, x, weights)
                yield case, partial(swiglu.backward, grad, x, weights)


CALLS = (policy_loss_calls, fp8_quant_calls, swiglu_calls)


def kernels() -> set[str]:
    """Return the names of all @triton.jit functions that no other one calls; the called ones are parts of kernels."""
    package = dapo_mcore.kernels
    found, called = set(), set()
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, triton.JITFunction):
                found.add(full_name(value))
                called |= {full_name(part) for part in parts(value)}
    return found - called


def parts(kernel: triton.JITFunction) -> list[triton.JITFunction]:
    """Return the @triton.jit functions that this one calls by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    names = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    candidates = (kernel.fn.__globals__.get(name) for name in names)
    return [candidate for candidate in candidates if isinstance(candidate, triton.JITFunction)]


def full_name(kernel: triton.JITFunction) -> str:
    return f"{kernel.fn.__module__.removeprefix(dapo_mcore.kernels.__name__ + '.')}.{kernel.fn.__name__}"


def resources(ptx: str) -> dict[str, int]:
    """Return registers per thread and spilled bytes of a kernel, as reported by ptxas with Triton's options."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx).group(1)
        command = [
            get_ptxas(TARGET.arch).path,
            "-v",
            f"--gpu-name={target}",
            str(source),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return {"registers": registers, "spilled": spilled}


def sum_layouts(ttgir: str) -> list[str]:
    """Return how each sum over a row is distributed over threads, which determines the order of its additions."""
    aliases = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    return [aliases[name] for name in re.findall(r"\}\) : \(tensor<\d+xf32, (#\w+)>", ttgir)]


def accesses(ptx: str) -> str:
    """Return the kernel's global reads (r), writes (w) and barriers (b) in the order of its code."""
    letters = {"ld.global": "r", "st.global": "w", "bar.sync": "b"}
    return "".join(letters[found] for found in re.findall(r"ld\.global|st\.global|bar\.sync", ptx))


def wide_bytes(ptx: str, warps: int) -> dict[str, int]:
    """Return the bytes that all threads together read and write in accesses of 16 bytes, loops counted once."""
    return {way: 16 * 32 * warps * len(re.findall(rf"{way}\.global[\w.:]*\.v4\.b32", ptx)) for way in ("ld", "st")}


def compile_all() -> Iterator[dict[str, object]]:
    """Yield a record per different compiled kernel."""
    triton.runtime.driver.set_active(NoDevice())
    launched: list[tuple[triton.JITFunction, object]] = []

    def compile_only(kernel, grid):
        return lambda *args, **options: launched.append((kernel, kernel.warmup(*args, grid=grid, **options)))

    triton.JITFunction.__getitem__ = compile_only
    seen = set()
    for calls_of_package in CALLS:
        for case, call in calls_of_package():
            launched.clear()
            call()
            for kernel, compiled in launched:
                if compiled.hash not in seen:
                    seen.add(compiled.hash)
                    yield {
                        "kernel": full_name(kernel),
                        "case": case,
                        "warps": compiled.metadata.num_warps,
                        "shared": compiled.metadata.shared,
                        **resources(compiled.asm["ptx"]),
                        "sum_layouts": sum_layouts(compiled.asm["ttgir"]),
                        "accesses": accesses(compiled.asm["ptx"]),
                        "e4m3_conversions": compiled.asm["ptx"].count("cvt.rn.satfinite.e4m3x2.f32"),
                        "wide_bytes": wide_bytes(compiled.asm["ptx"], compiled.metadata.num_warps),
                    }


if __name__ == "__main__":
    for record in compile_all():
        print(json.dumps(record), flush=True)
    print(json.dumps({"kernels": sorted(kernels())}))
