from __future__ import annotations

import re
from dataclasses import fields

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.observe.throughput import PEAK_TFLOPS
from dapo_mcore.plan.hardware import GPUS, Assumptions, assume, entries


def test_every_share_and_part_of_a_peak_is_at_most_1() -> None:
    for own in (*fields(GPUS["h100"]), *fields(Assumptions())):
        if own.metadata["unit"] == "share" or own.metadata["unit"].startswith("of "):
            with pytest.raises(ConfigError, match="at most 1"):
                assume(GPUS["h100"], Assumptions(), {own.name: 1.01})


def test_every_figure_has_a_source_and_a_note() -> None:
    found = list(entries(GPUS["h100"], Assumptions()))
    assert len(found) == len(fields(GPUS["h100"])) + len(fields(Assumptions()))
    assert {entry.source for entry in found} == {"measured", "vendor", "guess", "config"}
    assert all(len(entry.note) > 5 and entry.value >= 0 for entry in found)


def test_peaks_are_those_of_the_throughput_metrics() -> None:
    assert {name: gpu.bf16_tflops for name, gpu in GPUS.items()} == {name: PEAK_TFLOPS[name.upper()] for name in GPUS}


def test_a_chosen_figure_replaces_one_of_either_table() -> None:
    gpu, assumptions = assume(GPUS["h100"], Assumptions(), {"network_gbs": 25, "kept_ratio": 0.4})
    assert (gpu.network_gbs, assumptions.kept_ratio) == (25, 0.4)
    assert (GPUS["h100"].network_gbs, Assumptions().kept_ratio) == (50, 0)
    sources = {entry.name: entry.source for entry in entries(gpu, assumptions, chosen=["kept_ratio"])}
    assert (sources["kept_ratio"], sources["network_gbs"]) == ("yours", "vendor")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"kept_ration": 1},
            "--assume kept_ration: there is no such figure; did you mean kept_ratio? `--figures` lists all",
        ),
        ({"hbm_gbs": 0}, "--assume hbm_gbs=0: give a finite number above 0 (bandwidth of GPU memory)"),
        ({"hbm_gbs": float("inf")}, "--assume hbm_gbs=inf: give a finite number above 0"),
        ({"process_gib": -1}, "--assume process_gib=-1: give a finite number of at least 0"),
        ({"gemm_efficiency": float("nan")}, "--assume gemm_efficiency=nan: give a finite number above 0 and at most 1"),
        ({"gemm_efficiency": 0}, "--assume gemm_efficiency=0: give a finite number above 0"),
        ({"kept_ratio": 1.5}, "--assume kept_ratio=1.5: give a finite number of at least 0.001 and at most 1"),
        ({"mean_response_tokens": 0}, "--assume mean_response_tokens=0: give a finite number of at least 1"),
        ({"server_fraction": 0}, "--assume server_fraction=0: give a finite number of at least 0.01 and at most 1"),
        ({"expert_imbalance": 0.9}, "--assume expert_imbalance=0.9: give a finite number of at least 1"),
        ({"host_gib": 0}, "--assume host_gib=0: give a finite number above 0"),
    ],
)
def test_an_impossible_figure_is_refused(chosen: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        assume(GPUS["h100"], Assumptions(), chosen)
