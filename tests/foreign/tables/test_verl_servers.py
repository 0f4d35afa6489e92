"""verl's GPUs in our words: the layout of training, and servers of SGLang."""

from __future__ import annotations

from pathlib import Path

from dapo_mcore.foreign.convert import convert
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.tables.verl import VERL
from tests.foreign.verl_runs import GRPO, A, R, asked, imported, lost, ours

MEGATRON = f"{A}.megatron"
ONE_STEP_OFF = "verl.experimental.one_step_off_policy.main_ppo"


def test_the_layout_of_an_fsdp_script_is_asked_for() -> None:
    assert "parallel.tensor_parallel" in asked({})
    assert "parallel.tensor_parallel" in asked({f"{A}.ulysses_sequence_parallel_size": 8})


def test_the_layout_of_a_megatron_script_stands() -> None:
    settings = {f"{MEGATRON}.tensor_model_parallel_size": 4, f"{MEGATRON}.pipeline_model_parallel_size": 2}
    found = ours(settings)
    assert (found["parallel.tensor_parallel"], found["parallel.pipeline_parallel"]) == (4, 2)
    assert found["parallel.sequence_parallel"] is True and asked(settings) == []
    assert ours({f"{MEGATRON}.tensor_model_parallel_size": 1})["parallel.sequence_parallel"] is False


def test_experts_are_split_as_megatron_splits_them() -> None:
    """Megatron's ModelParallelConfig takes tensor_model_parallel_size where expert_tensor_parallel_size is None."""
    moe = {f"{MEGATRON}.tensor_model_parallel_size": 4, f"{MEGATRON}.expert_model_parallel_size": 8}
    assert ours(moe)["parallel.expert_tensor_parallel"] == 4
    assert ours({**moe, f"{MEGATRON}.expert_tensor_parallel_size": 1})["parallel.expert_tensor_parallel"] == 1
    assert "parallel.expert_tensor_parallel" not in ours({**moe, f"{MEGATRON}.expert_model_parallel_size": 1})


def test_servers_take_all_gpus_in_turn_with_training() -> None:
    found = ours({"trainer.nnodes": 16, f"{R}.tensor_model_parallel_size": 4, f"{R}.name": "vllm"})
    assert found["rollout.engine"] == "sglang" and found["rollout.sglang.num_servers"] == 32
    assert found["rollout.sglang.colocated"] is True and found["rollout.sglang.sync"] == "tensor"
    assert (found["rollout.sglang.placement"], found["rollout.sglang.host"]) == ("nodes", "node")
    assert "rollout.sglang.placement" not in ours({"trainer.nnodes": 1})


def test_a_server_wider_than_a_node_is_asked_for() -> None:
    wide = asked({"trainer.nnodes": 4, f"{R}.tensor_model_parallel_size": 16, **{f"{A}.strategy": "megatron"}})
    assert wide == ["rollout.sglang.tensor_parallel", "rollout.sglang.num_servers"]


def test_one_step_off_policy() -> None:
    settings = {
        "trainer.nnodes": 2, "trainer.n_gpus_per_node": 6, "rollout.nnodes": 2, "rollout.n_gpus_per_node": 2,
        f"{R}.tensor_model_parallel_size": 2, "actor_rollout_ref.hybrid_engine": False, f"{A}.strategy": "megatron",
    }  # fmt: skip
    found = ours(settings, ONE_STEP_OFF)
    assert (found["rollout.async_steps"], found["rollout.sglang.num_servers"]) == (1, 2)
    assert found["rollout.sglang.colocated"] is False and found["rollout.sglang.sync"] == "distributed"
    assert found["algo.old_logprobs"] == "rollout" and asked(settings, ONE_STEP_OFF) == []
    without = {**settings, "algorithm.rollout_correction.bypass_mode": False}
    assert asked(without, ONE_STEP_OFF) == ["algo.tis.mode"]


def test_the_fully_asynchronous_program_counts_gpus_prompts_and_evaluations_apart() -> None:
    """verl/experimental/fully_async_policy: 12 × 8 GPUs generate, 4 × 8 train; weights are handed over after 4 × 1 × 128 prompts."""
    settings = {
        "trainer.nnodes": 4, "rollout.nnodes": 12, "rollout.n_gpus_per_node": 8, f"{R}.tensor_model_parallel_size": 4,
        "rollout.total_rollout_steps": 204800, "trainer.total_epochs": 10, "rollout.test_freq": 20, "data.train_batch_size": 0,
        f"{A}.ppo_mini_batch_size": 128, f"{A}.strategy": "megatron",
    }  # fmt: skip
    entry = "verl.experimental.fully_async_policy.fully_async_main"
    found = ours(settings, entry)
    assert (found["rollout.sglang.num_servers"], found["rollout.sglang.colocated"]) == (24, False)
    assert found["eval.every"] == 20 and "num_epochs" not in found
    assert "torchrun" in next(o.note for o in imported(settings, entry).outcomes if o.sources == ("trainer.nnodes",))
    questions = imported({**GRPO, **settings}, entry).asked
    assert list(questions) == ["num_rollout_steps", "sampling.train_batch_prompts"]
    assert "204800 prompts" in questions["num_rollout_steps"].note
    assert "4 × 1 × 128 = 512 prompts" in questions["sampling.train_batch_prompts"].note
    in_epochs = {**settings, "rollout.total_rollout_steps": None}
    assert ours(in_epochs, entry)["num_epochs"] == 10


def test_an_unknown_number_of_nodes_is_one_question() -> None:
    settings = (
        ForeignSetting("algorithm.adv_estimator", "grpo", "run.sh line 1"),
        ForeignSetting("trainer.nnodes", "${NODES}", "run.sh line 2", ("NODES",)),
        ForeignSetting(f"{A}.strategy", "megatron", "run.sh line 3"),
    )
    conversion = convert(ForeignRun("verl", Path("run.sh"), "verl.trainer.main_ppo", "", settings), VERL)
    assert list(conversion.asked)[2:] == ["rollout.sglang.num_servers"]  # after model and data
    assert "rollout.sglang.placement=nodes" in conversion.asked["rollout.sglang.num_servers"].note


def test_an_engine_of_more_ranks_is_asked_for() -> None:
    wide = {f"{A}.strategy": "megatron", f"{R}.tensor_model_parallel_size": 1, f"{R}.data_parallel_size": 8}
    assert asked(wide) == ["rollout.sglang.tensor_parallel", "rollout.sglang.num_servers"]
    assert asked({**wide, f"{R}.data_parallel_size": 1}) == []


def test_what_an_engine_does_to_samples_is_never_meaningless() -> None:
    for key, value in {"skip_rollout": True, "over_sample_rate": 0.1, "repetition_penalty": 1.1,
                       "agent.agent_loop_manager_class": "my.Manager", "new_option": 1}.items():  # fmt: skip
        assert lost({f"{R}.{key}": value}) == {f"{R}.{key}": True}
    assert lost({f"{R}.engine_kwargs.vllm.swap_space": 4, f"{R}.over_sample_rate": 0}) == {}


def test_options_of_the_servers() -> None:
    settings = {
        f"{R}.name": "sglang", f"{R}.gpu_memory_utilization": 0.6, f"{R}.enforce_eager": True, f"{R}.max_num_seqs": 64,
        f"{R}.enable_chunked_prefill": False, f"{R}.engine_kwargs.sglang.attention_backend": "fa3",
    }  # fmt: skip
    assert ours(settings)["rollout.sglang.server_args"] == {
        "mem-fraction-static": 0.6,
        "max-running-requests": 64,
        "disable-cuda-graph": True,
        "chunked-prefill-size": -1,
        "attention-backend": "fa3",
    }


def test_the_context_under_the_names_of_both_engines() -> None:
    for key in ("max_model_len", "engine_kwargs.vllm.max_model_len", "engine_kwargs.vllm.max-model-len"):
        assert ours({f"{R}.{key}": 32768})["rollout.sglang.server_args"]["context-length"] == 32770


def test_quantized_servers() -> None:
    assert ours({f"{R}.quantization": "fp8"})["rollout.sglang.quantize"] == "fp8"
    assert lost({f"{R}.quantization": "torchao"}) == {f"{R}.quantization": False}
