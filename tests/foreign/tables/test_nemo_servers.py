"""NeMo-RL's servers in our words, by hand."""

from __future__ import annotations

from tests.foreign.nemo_runs import imported, ours


def test_servers() -> None:
    found = ours(
        {"cluster.num_nodes": 2, "cluster.gpus_per_node": 8, "policy.generation.vllm_cfg.tensor_parallel_size": 4}
    )
    assert (found["rollout.sglang.num_servers"], found["rollout.sglang.placement"], found["rollout.sglang.sync"]) == (
        4,
        "nodes",
        "tensor",
    )
    apart = {"policy.generation.colocated.enabled": False, "cluster.num_nodes": 3, "cluster.gpus_per_node": 8}
    assert "rollout.sglang.num_servers" in imported(apart).asked, "it says no GPUs"
    place = "policy.generation.colocated.resources"
    found = ours(
        {
            **apart,
            f"{place}.num_nodes": 2,
            f"{place}.gpus_per_node": 8,
            "policy.generation.vllm_cfg.tensor_parallel_size": 4,
        }
    )
    assert (found["rollout.sglang.num_servers"], found["rollout.sglang.sync"]) == (4, "distributed")


def test_options_of_vllm_that_sglang_has() -> None:
    found = ours({"policy.generation.vllm_cfg.precision": "fp8", "policy.generation.vllm_cfg.kv_cache_dtype": "fp8"})
    assert found["rollout.sglang.quantize"] == "fp8"
    assert found["rollout.sglang.server_args"] == {"mem-fraction-static": 0.6, "kv-cache-dtype": "fp8_e4m3"}
    assert imported({"policy.generation.vllm_kwargs.max_num_seqs": 4}).losses == {
        "policy.generation.vllm_kwargs.max_num_seqs": False
    }


def test_sglangs_own_options() -> None:
    place = "policy.generation.sglang_cfg"
    found = ours(
        {
            "policy.generation.backend": "sglang", "cluster.gpus_per_node": 8, f"{place}.sglang_server_config.num_gpus_per_engine": 2,
            f"{place}.mem_fraction_static": 0.7, f"{place}.model_path": "x", f"{place}.random_seed": 1, f"{place}.context_length": 512,
            f"{place}.sglang_server_config.sglang_server_concurrency": 64,
        }
    )  # fmt: skip
    assert found["rollout.sglang.server_args"] == {"mem-fraction-static": 0.7}
    names = ("tensor_parallel", "num_servers", "max_in_flight")
    assert [found[f"rollout.sglang.{name}"] for name in names] == [2, 4, 64]


def test_other_engines_are_laid_out_anew() -> None:
    for backend in (
        {"policy.generation.backend": "megatron"},
        {"policy.generation.vllm_cfg.pipeline_parallel_size": 2},
    ):
        assert {"rollout.sglang.tensor_parallel", "rollout.sglang.num_servers"} <= set(imported(backend).asked)
