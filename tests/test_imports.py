"""Imports point down: every module of dapo_mcore imports only its own floor or lower ones. Read from the AST.

Change here: the floor of a new module, and which folders may import a framework.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "dapo_mcore": 0,
    "dapo_mcore.errors": 0,
    "dapo_mcore.kernels": 0,
    "dapo_mcore.config": 0,
    "dapo_mcore.process": 0,
    "dapo_mcore.process.plugin": 1,
    "dapo_mcore.process.ray_cluster": 1,
    "dapo_mcore.process.route": 1,
    "dapo_mcore.foreign": 1,
    "dapo_mcore.types": 1,
    "dapo_mcore.architecture": 1,
    "dapo_mcore.hub": 1,
    "dapo_mcore.model_files": 2,
    "dapo_mcore.data": 2,
    "dapo_mcore.reward": 2,
    "dapo_mcore.tools": 2,
    "dapo_mcore.algo": 2,
    "dapo_mcore.batch": 2,
    "dapo_mcore.observe": 2,
    "dapo_mcore.actor": 3,
    "dapo_mcore.rollout": 3,
    "dapo_mcore.checkpoint": 4,
    "dapo_mcore.convert": 4,
    "dapo_mcore.eval": 4,
    "dapo_mcore.earlier_run": 4,
    "dapo_mcore.handover": 4,
    "dapo_mcore.step_report": 4,
    "dapo_mcore.preflight": 5,
    "dapo_mcore.doctor": 6,
    "dapo_mcore.controller": 5,
    "dapo_mcore.plan": 5,
    "dapo_mcore.replay": 4,
    "dapo_mcore.warm_start": 5,
    "dapo_mcore.train": 6,
    "dapo_mcore.cli": 6,
}
"""The longest matching prefix gives the floor of a module. Each module of the top level must be named."""

MEGATRON = (
    "dapo_mcore.actor",
    "dapo_mcore.checkpoint.checkpoint",
    "dapo_mcore.actor.weight_stream",
    "dapo_mcore.train",
)
SGLANG = ("dapo_mcore.rollout",)
PARALLEL_STATE = ("dapo_mcore.actor.parallel.layout",)
STRANGERS = (("dapo_mcore.actor", "dapo_mcore.rollout"), ("dapo_mcore.rollout", "dapo_mcore.actor"))
FLOOR_0_PACKAGES = {"pydantic", "yaml", "dapo_mcore", *sys.stdlib_module_names}
KERNEL_PACKAGES = {"torch", "triton", *sys.stdlib_module_names}


def within(module: str, *folders: str) -> bool:
    return any(module == folder or module.startswith(folder + ".") for folder in folders)


def floor(module: str) -> int | None:
    """Return the floor of a module, None for an unnamed module of the top level."""
    prefixes = [name for name in FLOORS if name != "dapo_mcore" and within(module, name)]
    return FLOORS[max(prefixes, key=len)] if prefixes else FLOORS.get(module)


def imports(module: str, source: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute name) of every import in the file, also in functions and for type checkers.

    `from a import b` gives `a.b`, which is right for submodules and harmless for the rest: prefixes are compared.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def reads_parallel_state(source: str) -> bool:
    names = {"parallel_state", "mpu"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            return True
        if isinstance(node, ast.Import) and any(names & set(alias.name.split(".")) for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron"):
            read = {*node.module.split("."), *(alias.name for alias in node.names)}
            if names & read:
                return True
    return False


def broken_rule(module: str, imported: str) -> str | None:
    """Return the rule that this import breaks, or None if it is allowed."""
    top = imported.split(".")[0]
    if within(module, "dapo_mcore.kernels"):
        inside = top in KERNEL_PACKAGES or within(imported, "dapo_mcore.kernels")
        return None if inside else "kernels import torch, triton, the standard library and themselves"
    if top == "dapo_mcore":
        return broken_floor(module, imported)
    if floor(module) == 0 and top not in FLOOR_0_PACKAGES:
        return "floor 0 imports the standard library, pydantic and yaml"
    if top == "megatron" and not within(module, *MEGATRON):
        return f"only {', '.join(MEGATRON)} import megatron"
    if top == "sglang" and not within(module, *SGLANG):
        return "only rollout imports sglang"
    return None


def broken_floor(module: str, imported: str) -> str | None:
    if within(imported, "dapo_mcore.train") and not within(module, "dapo_mcore.train"):
        return "nobody imports train"
    if any(within(module, a) and within(imported, b) for a, b in STRANGERS):
        return "actor and rollout never import each other"
    above, below = floor(module), floor(imported)
    if above is None or below is None:
        return "a module without a floor: name it in FLOORS"
    return f"floor {above} imports floor {below}" if below > above else None


def violations(sources: Mapping[str, str], packages: frozenset[str] = frozenset()) -> list[str]:
    """Return one line for each broken rule in {module name: source}."""
    found = [f"{module}: a module without a floor: name it in FLOORS" for module in sources if floor(module) is None]
    for module, source in sources.items():
        for line, imported in imports(module, source, module in packages):
            if rule := broken_rule(module, imported):
                found.append(f"{module}:{line} imports {imported}: {rule}")
        if reads_parallel_state(source) and not within(module, *PARALLEL_STATE):
            found.append(f"{module} reads parallel_state: only {PARALLEL_STATE[0]} does")
    return found


def two_way_folders(sources: Mapping[str, str], packages: frozenset[str]) -> list[str]:
    """Return the pairs of folders that import each other. A folder's __init__ belongs to the folder; the top level is left out."""

    def folder(module: str) -> str:
        return module if module in packages else module.rpartition(".")[0]

    arrows = set()
    for module, source in sources.items():
        for _, name in imports(module, source, module in packages):
            target = name if name in sources else name.rpartition(".")[0]
            if target in sources and folder(target) != folder(module):
                arrows.add((folder(module), folder(target)))
    top = {"", "dapo_mcore"}
    return sorted(f"{a} and {b}" for a, b in arrows if (b, a) in arrows and a < b and not top & {a, b})


def project() -> tuple[dict[str, str], frozenset[str]]:
    """Return {module name: source} of dapo_mcore and kernels, and the modules that are packages."""
    sources, packages = {}, set()
    for folder, prefix in ((ROOT / "dapo_mcore", "dapo_mcore"), (ROOT / "kernels", "dapo_mcore.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(parts).removesuffix(".__init__")
            sources[name] = path.read_text(encoding="utf-8")
            if path.name == "__init__.py":
                packages.add(name)
    return sources, frozenset(packages)


def test_the_project_imports_only_downwards() -> None:
    sources, packages = project()
    assert len(sources) > 10, "the checker found no modules"
    assert violations(sources, packages) == []


def test_every_module_named_by_a_rule_exists() -> None:
    named = {*FLOORS, *MEGATRON, *SGLANG, *PARALLEL_STATE, *(name for pair in STRANGERS for name in pair)}
    assert sorted(named - set(project()[0]) - {"dapo_mcore.kernels"}) == []  # kernels/ has no __init__.py


def test_no_two_folders_import_each_other() -> None:
    assert two_way_folders(*project()) == []


def test_two_folders_that_import_each_other_are_found() -> None:
    packages = frozenset({"dapo_mcore.a", "dapo_mcore.b", "dapo_mcore.a.c"})
    sources = dict.fromkeys(packages, "") | {
        "dapo_mcore.a.x": "from dapo_mcore.b.y import f\nfrom dapo_mcore.a.c import z",
        "dapo_mcore.b.y": "from dapo_mcore.a.c import z",
        "dapo_mcore.a.c.z": "",
    }
    assert two_way_folders(sources, packages) == []
    sources["dapo_mcore.a.c.z"] = "def f():\n    import dapo_mcore.b.y"
    assert two_way_folders(sources, packages) == ["dapo_mcore.a.c and dapo_mcore.b"]


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("dapo_mcore.algo.loss", "from dapo_mcore.rollout import sampler", "floor 2 imports floor 3"),
        ("dapo_mcore.algo.loss", "def f():\n    from ..actor.head import PolicyHead", "floor 2 imports floor 3"),
        ("dapo_mcore.algo.loss", "from dapo_mcore import train", "nobody imports train"),
        ("dapo_mcore.cli", "import dapo_mcore.train", "nobody imports train"),
        ("dapo_mcore.algo.loss", "from megatron.core import tensor_parallel", "import megatron"),
        ("dapo_mcore.architecture.mapping", "from dapo_mcore.actor import step", "floor 1 imports floor 3"),
        ("dapo_mcore.architecture.mapping", "from ..data import rows", "floor 1 imports floor 2"),
        (
            "dapo_mcore.actor.forward_backward",
            "from dapo_mcore.rollout.sampling.sampler import Sampler",
            "never import each other",
        ),
        ("dapo_mcore.rollout.sampling.sampler", "import dapo_mcore.actor.actor", "never import each other"),
        ("dapo_mcore.config.schema", "import torch", "floor 0"),
        ("dapo_mcore.errors", "from megatron.core import x", "floor 0"),
        ("dapo_mcore.types", "from dapo_mcore.data.loader import Loader", "floor 1 imports floor 2"),
        ("dapo_mcore.eval", "import sglang.srt", "only rollout"),
        ("dapo_mcore.kernels.policy_loss.kernel", "from dapo_mcore.errors import DapoError", "kernels import"),
        ("dapo_mcore.kernels.policy_loss.kernel", "import numpy", "kernels import"),
        ("dapo_mcore.actor.forward_backward", "from megatron.core import parallel_state", "reads parallel_state"),
        ("dapo_mcore.actor.forward_backward", "from megatron.core import mpu", "reads parallel_state"),
        ("dapo_mcore.actor.forward_backward", "import megatron.core.parallel_state as ps", "reads parallel_state"),
        (
            "dapo_mcore.actor.forward_backward",
            "import megatron.core as m\nm.parallel_state.x()",
            "reads parallel_state",
        ),
        ("dapo_mcore.helpers", "import math", "without a floor"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, rule: str) -> None:
    assert any(rule in line for line in violations({module: source}))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dapo_mcore.actor.parallel.layout", "from megatron.core import parallel_state"),
        ("dapo_mcore.actor.head", "from dapo_mcore.kernels.policy_head import head_logprobs"),
        ("dapo_mcore.actor.weight_stream", "from dapo_mcore.architecture.mapping import table"),
        ("dapo_mcore.kernels.policy_loss.kernel", "import torch\nimport triton\nfrom .torch_path import loss"),
        ("dapo_mcore.train", "from dapo_mcore.actor.actor import Actor\nimport megatron.core"),
        ("dapo_mcore.rollout.sglang", "import sglang"),
        ("dapo_mcore.data.loader", "from dapo_mcore.errors import DataError\nimport numpy, torch"),
    ],
)
def test_an_allowed_import_is_left_alone(module: str, source: str) -> None:
    assert violations({module: source}) == []
