"""Python packages: which are in use, what takes the place of those that are not, and wrong ones of the same name.

Change here: a package that makes a difference to a run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from dapo_mcore.actor.parallel.megatron_version import check_version
from dapo_mcore.doctor.finding import Finding, fallback, hint, ok, wrong
from dapo_mcore.doctor.installed import Import, Installed
from dapo_mcore.errors import ConfigError

ENGINE = "transformer_engine.pytorch"
_OLDEST_PYTHON, _OLDEST_TORCH = (3, 11), (2, 11)
_FIRST_ENGINE, _END_FOR_OLD_MEGATRON = (2, 9), (2, 12)
"""Transformer Engine, as megatron-core asks for it: version 0.16 below 2.12, later ones without an upper end."""
_STRANGERS = {
    "apex": ("a web toolkit, not NVIDIA's apex", "apex.optimizers", "pip uninstall apex; a run needs neither"),
    "cutlass": (
        "a stranger, not NVIDIA's CUTLASS",
        "cutlass.cute",
        "pip uninstall cutlass; NVIDIA's is nvidia-cutlass-dsl",
    ),
}
"""By a name on PyPI: what it is, a module that only NVIDIA's package has, the remedy."""


def check_packages(installed: Installed, torch: Import, engine: Import | None, on_gpu: bool) -> list[Finding]:
    """Return a finding for each package.

    torch, engine  outcomes of importing torch and Transformer Engine, see installed.try_import; None if it is not installed
    """
    return [
        check_python(sys.version_info[:3]),
        check_torch(torch),
        check_megatron(installed.version("megatron-core")),
        check_engine(installed.version("transformer-engine"), engine, on_gpu, installed.version("megatron-core")),
        check_apex(installed, on_gpu),
        check_fused_adam(installed, engine, on_gpu),
        check_flash_attention(installed, engine, on_gpu),
        check_triton(installed, on_gpu),
        check_ray(installed.version("ray")),
        check_dali(installed),
        *check_strangers(installed),
    ]


def check_python(version: Sequence[int]) -> Finding:
    shown = ".".join(map(str, version))
    if tuple(version[:2]) < _OLDEST_PYTHON:
        return wrong("Python", f"{shown} is older than 3.11", "make a virtual environment with Python 3.11 or newer")
    return ok("Python", f"{shown}, {sys.executable}")


def check_torch(torch: Import) -> Finding:
    if torch.error:
        return wrong("torch", torch.error, "pip install 'torch>=2.11' for this machine's CUDA (https://pytorch.org)")
    version, cuda = torch.facts["version"], torch.facts["cuda"]
    if _numbers(version) < _OLDEST_TORCH:
        return wrong("torch", f"{version} is older than 2.11", "pip install 'torch>=2.11'")
    return ok("torch", f"{version}, {f'built for CUDA {cuda}' if cuda else 'built for CPUs'}")


def check_megatron(version: str | None) -> Finding:
    name = "megatron-core"
    if version is None:
        return wrong(name, "not installed", "pip install dapo_mcore again, with its dependencies")
    try:
        check_version(version)
    except ConfigError as error:
        detail, _, remedy = str(error).rpartition("; ")
        return wrong(name, detail, remedy)
    return ok(name, version)


def check_engine(version: str | None, engine: Import | None, on_gpu: bool, megatron: str | None) -> Finding:
    """Return whether Transformer Engine's layers are in use. `engine` is None if it is not installed."""
    name, place = "Transformer Engine", "Megatron's local layers take its place"
    if engine is None:
        if not on_gpu:
            return fallback(name, f"not installed, and without a GPU not needed: {place}, FP8 is simulated")
        return fallback(
            name, f"not installed: {place}, without FP8 and fused attention", "pip install 'dapo_mcore[te]'"
        )
    if not on_gpu:
        return fallback(name, f"{version or 'installed'}, but without a GPU {place}")
    if engine.error:
        return wrong(
            name,
            f"{version or 'installed'}, but it cannot be imported: {engine.error}",
            "install the build for this torch and CUDA (pip install --no-build-isolation 'transformer-engine[pytorch]'), or "
            "uninstall it to run with local layers",
        )
    version = version or engine.facts.get("version") or "unknown"
    if not _fits(version, megatron or ""):
        wanted = f">={_dotted(_FIRST_ENGINE)}" + f",<{_dotted(_END_FOR_OLD_MEGATRON)}" * _is_old(megatron or "")
        return hint(
            name,
            f"{version}, but megatron-core {megatron} is made for transformer-engine{wanted}",
            f"pip install --no-build-isolation 'transformer-engine[pytorch]{wanted}'",
        )
    return ok(name, f"{version}: layers, fused attention and FP8")


def _fits(version: str, megatron: str) -> bool:
    numbers = _numbers(version)
    return not numbers or (numbers >= _FIRST_ENGINE and not (_is_old(megatron) and numbers >= _END_FOR_OLD_MEGATRON))


def _is_old(megatron: str) -> bool:
    return _numbers(megatron) == (0, 16)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version: (2, 11) for `2.11.0+cu130`."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def check_apex(installed: Installed, on_gpu: bool) -> Finding:
    """Return which of the extensions of NVIDIA's apex are found. Only they tell it from PyPI's `apex`."""
    name, modules = "NVIDIA's apex", ("amp_C", "fused_weight_gradient_mlp_cuda")
    found = [module for module in modules if installed.has(module)]
    if found and on_gpu:
        return ok(name, f"{' and '.join(found)} found; Transformer Engine's layers need none of them")
    if found:
        return fallback(name, f"{' and '.join(found)} found, but without a GPU not used")
    if on_gpu:
        return fallback(
            name, "not installed: without Transformer Engine, adding weight gradients takes passes of their own"
        )
    return fallback(name, "not installed, and without a GPU not needed")


def check_fused_adam(installed: Installed, engine: Import | None, on_gpu: bool) -> Finding:
    name = "fused Adam"
    if on_gpu and engine is not None and not engine.error:
        return ok(name, "Transformer Engine's FusedAdam")
    if on_gpu and installed.has("amp_C") and installed.has("apex.optimizers"):
        return ok(name, "apex's FusedAdam; moments in bf16 and offload_fraction need Transformer Engine's")
    remedy = "pip install 'dapo_mcore[te]'" if on_gpu else ""
    return fallback(
        name, "torch's AdamW; moments in bf16 and offload_fraction need Transformer Engine and a GPU", remedy
    )


def check_flash_attention(installed: Installed, engine: Import | None, on_gpu: bool) -> Finding:
    """Return whether flash-attn is in use: only Transformer Engine's layers call it."""
    name, version = "flash-attn", installed.version("flash-attn") or installed.version("flash-attn-3")
    if not on_gpu or engine is None:
        return fallback(name, f"{version or 'not installed'}: attention of local layers is torch's")
    if version is None:
        return fallback(name, "not installed: Transformer Engine takes cuDNN's fused attention")
    tried = installed.try_import("flash_attn") if installed.has("flash_attn") else Import()
    if tried.error:
        return wrong(
            name,
            f"{version}, but it cannot be imported: {tried.error}",
            "build it for this torch (pip install --no-build-isolation flash-attn), or uninstall it",
        )
    return ok(name, f"{version}: Transformer Engine may choose it")


def check_triton(installed: Installed, on_gpu: bool) -> Finding:
    version = installed.version("triton")
    if on_gpu and version:
        return ok("Triton", f"{version}: the kernels of policy head, loss, SwiGLU and FP8")
    if on_gpu:
        return fallback(
            "Triton", "not installed: kernels run as plain PyTorch, which is slower and larger", "pip install triton"
        )
    return fallback("Triton", f"{version or 'not installed'}: without a GPU kernels run as plain PyTorch")


def check_ray(version: str | None) -> Finding:
    if version:
        return ok("Ray", f"{version}: servers and reward workers on other machines (placement ray)")
    return fallback(
        "Ray", "not installed: servers and reward workers start here", "pip install 'dapo_mcore[ray]' for others"
    )


def check_dali(installed: Installed) -> Finding:
    names = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    if version := next((found for name in names if (found := installed.version(name))), None):
        return ok("DALI", f"{version}: for batch.feeder dali; plain is faster")
    return fallback("DALI", "not installed: micro-batches are fed by batch.feeder plain, which is faster")


def check_strangers(installed: Installed) -> list[Finding]:
    """Return the packages of PyPI that have the name of something else."""
    findings = [
        hint(f"PyPI's {name}", f"{version} is {what}, and takes its name", remedy)
        for name, (what, own_module, remedy) in _STRANGERS.items()
        if (version := installed.version(name)) and not installed.has(own_module)
    ]
    if version := installed.version("kernels"):
        findings.append(
            hint(
                "PyPI's kernels",
                f"{version} is Hugging Face's, which loads kernels from its Hub; this project's are dapo_mcore.kernels",
                "pip uninstall kernels, unless another program here needs it",
            )
        )
    return findings


def check_sglang(
    python: str, ask: Callable[[str], str | None], check: Callable[[str], None], needed: bool = False
) -> Finding:
    """Return whether the interpreter that starts servers has a supported SGLang.

    ask    returns an interpreter's SGLang version, None if it has none; raises ConfigError if it cannot be asked.
    check  raises ConfigError for a version that is not supported, ValueError for a text that is no version.
    needed  True if the run starts servers here, and so cannot start without it
    """
    remedy = "give the interpreter of an environment that has it as rollout.sglang.python"
    try:
        version = ask(python)
        if version is None:
            if needed:
                return wrong("SGLang", f"not in {python}, but the run starts servers with it", remedy)
            return fallback("SGLang", f"not in {python}: only rollout.engine embedded or servers at urls", remedy)
        check(version)
    except (ConfigError, ValueError) as error:
        state = wrong if needed else hint
        return state("SGLang", str(error), "pip install 'dapo_mcore[sglang]' in an environment of its own")
    return ok("SGLang", f"{version} in {python}")
