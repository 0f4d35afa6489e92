"""Packages in environments that are not this one: each that is missing or wrong has its reason and its remedy."""

from __future__ import annotations

import pytest

from dapo_mcore.doctor import packages
from dapo_mcore.doctor.finding import State
from dapo_mcore.doctor.installed import Import
from dapo_mcore.errors import ConfigError
from tests.doctor.environments import environment, gpu, torch_with

BROKEN = Import("ImportError: libcudnn_graph.so.9: undefined symbol")


def test_a_machine_with_everything_has_nothing_to_mend() -> None:
    versions = {
        "megatron-core": "0.16.1",
        "transformer-engine": "2.11.0",
        "flash-attn": "2.8.3",
        "triton": "3.6.0",
        "ray": "2.60.0",
        "nvidia-dali-cuda130": "2.4.0",
    }
    full = environment(versions, ("amp_C", "fused_weight_gradient_mlp_cuda", "apex.optimizers", "flash_attn"))
    found = packages.check_packages(full, torch_with(gpu()), Import(), on_gpu=True)
    assert [finding for finding in found if finding.state is not State.OK] == []
    assert len(found) == 10
    assert next(f.detail for f in found if f.name == "fused Adam") == "Transformer Engine's FusedAdam"


def test_an_empty_environment_says_what_takes_each_place() -> None:
    found = {f.name: f for f in packages.check_packages(environment(), BROKEN, None, on_gpu=False)}
    assert {name for name, f in found.items() if f.state is State.WRONG} == {"torch", "megatron-core"}
    places = {
        "Transformer Engine": "Megatron's local layers",
        "fused Adam": "torch's AdamW",
        "flash-attn": "attention of local layers is torch's",
        "Triton": "plain PyTorch",
        "Ray": "start here",
        "DALI": "batch.feeder plain",
    }
    for name, place in places.items():
        assert found[name].state is State.FALLBACK
        assert place in found[name].detail


@pytest.mark.parametrize(
    ("found", "state", "detail", "remedy"),
    [
        (packages.check_python((3, 10, 4)), State.WRONG, "3.10.4 is older than 3.11", "virtual environment"),
        (packages.check_torch(torch_with(version="2.9.1")), State.WRONG, "2.9.1 is older than 2.11", "torch>=2.11"),
        (packages.check_torch(BROKEN), State.WRONG, "undefined symbol", "for this machine's CUDA"),
        (
            packages.check_megatron("0.15.0"),
            State.WRONG,
            "0.16.1 or later and below 0.20",
            "pip install 'megatron-core>=0.16.1,<0.20'",
        ),
        (packages.check_megatron("0.19.2"), State.OK, "0.19.2", ""),
        (
            packages.check_engine("2.11.0", BROKEN, True, "0.16.1"),
            State.WRONG,
            "undefined symbol",
            "the build for this torch",
        ),
        (
            packages.check_engine("2.12.0", Import(), True, "0.16.1"),
            State.HINT,
            "is made for transformer-engine>=2.9,<2.12",
            "<2.12'",
        ),
        (
            packages.check_engine("2.8.0", Import(), True, "0.19.2"),
            State.HINT,
            "2.8.0, but megatron-core 0.19.2",
            ">=2.9'",
        ),
        (packages.check_engine("2.20.0", Import(), True, "0.19.2"), State.OK, "2.20.0", ""),
        (packages.check_engine(None, None, True, "0.16.1"), State.FALLBACK, "without FP8", "dapo_mcore[te]"),
        (packages.check_engine("2.11.0", Import(), False, "0.16.1"), State.FALLBACK, "but without a GPU", ""),
        (packages.check_apex(environment(), True), State.FALLBACK, "passes of their own", ""),
        (packages.check_apex(environment(modules=("amp_C",)), False), State.FALLBACK, "without a GPU not used", ""),
        (packages.check_fused_adam(environment(), BROKEN, True), State.FALLBACK, "torch's AdamW", "dapo_mcore[te]"),
        (
            packages.check_fused_adam(environment(modules=("amp_C", "apex.optimizers")), None, True),
            State.OK,
            "apex's FusedAdam",
            "",
        ),
        (
            packages.check_flash_attention(environment(), None, True),
            State.FALLBACK,
            "attention of local layers is torch's",
            "",
        ),
        (packages.check_flash_attention(environment(), Import(), True), State.FALLBACK, "cuDNN's fused attention", ""),
        (
            packages.check_flash_attention(
                environment({"flash-attn": "2.7"}, ("flash_attn",), {"flash_attn": BROKEN}), Import(), True
            ),
            State.WRONG,
            "undefined symbol",
            "build it for this torch",
        ),
        (packages.check_triton(environment(), True), State.FALLBACK, "plain PyTorch", "pip install triton"),
        (packages.check_ray(None), State.FALLBACK, "start here", "dapo_mcore[ray]"),
    ],
)
def test_a_fault_has_its_state_reason_and_remedy(found, state: State, detail: str, remedy: str) -> None:
    assert found.state is state
    assert detail in found.detail
    assert remedy in found.remedy
    assert bool(found.remedy) == bool(remedy)


def test_packages_of_pypi_with_the_name_of_something_else_are_named() -> None:
    wrong = packages.check_strangers(environment({"apex": "0.9.10.dev0", "cutlass": "0.2", "kernels": "0.11"}))
    assert [f.name for f in wrong] == ["PyPI's apex", "PyPI's cutlass", "PyPI's kernels"]
    assert all(f.state is State.HINT and f"pip uninstall {f.name.split()[1]}" in f.remedy for f in wrong)
    nvidias = environment({"apex": "0.1", "nvidia-cutlass-dsl": "4.3"}, ("apex.optimizers", "cutlass.cute"))
    assert packages.check_strangers(nvidias) == []


def test_sglang_is_asked_in_its_own_environment() -> None:
    def refuse(version: str) -> None:
        if version != "0.5.21":
            raise ConfigError(f"SGLang {version} is too old")

    def found(version: str | None, needed: bool = False):
        return packages.check_sglang("/sglang/bin/python", lambda python: version, refuse, needed)

    assert (found("0.5.21").state, found("0.5.21").detail) == (State.OK, "0.5.21 in /sglang/bin/python")
    assert (found(None).state, "rollout.sglang.python" in found(None).remedy) == (State.FALLBACK, True)
    assert (found("0.5.10").state, found("0.5.10").detail) == (State.HINT, "SGLang 0.5.10 is too old")
    assert [found(version, needed=True).state for version in ("0.5.21", None, "0.5.10")] == [
        State.OK,
        State.WRONG,
        State.WRONG,
    ]
