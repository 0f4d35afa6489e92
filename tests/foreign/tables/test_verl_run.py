"""verl's length, model, batches, optimizer, checkpoints and loggers in our words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dapo_mcore.foreign.convert import convert
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.tables.verl import VERL
from tests.foreign.verl_runs import A, M, R, asked, imported, lost, ours


def test_epochs_stay_epochs() -> None:
    assert ours({"trainer.total_epochs": 3})["num_epochs"] == 3
    settings = {"trainer.total_epochs": 3, "trainer.total_training_steps": 200}
    both = ours(settings)
    assert both["num_rollout_steps"] == 200 and "num_epochs" not in both
    (told,) = [o for o in imported(settings).outcomes if o.ours == "num_rollout_steps"]
    assert told.note.startswith("verl ends after 3 epochs if they come first"), "the shorter of the two ends verl's run"


def test_epochs_under_filtering_are_asked_for() -> None:
    settings = {"trainer.total_epochs": 1, "algorithm.filter_groups.enable": True}
    assert "num_epochs" in asked(settings) and "num_epochs" not in ours(settings)
    assert "num_epochs" not in asked({**settings, "trainer.total_training_steps": 300})


def test_a_name_that_no_folder_may_have_is_cleaned() -> None:
    assert ours({"trainer.experiment_name": "grpo @ 7B/math"})["name"] == "grpo-7B-math"
    assert ours({"trainer.experiment_name": "run", "trainer.default_local_dir": "/c/p/run"})["output_dir"] == "/c/p"
    assert ours({"trainer.experiment_name": "run", "trainer.default_local_dir": "/c/p"})["output_dir"] == "/c/p"


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({f"{A}.use_dynamic_bsz": True, f"{A}.ppo_max_token_len_per_gpu": 22528}, 22528),
        ({f"{A}.ppo_micro_batch_size_per_gpu": 4}, 4 * 1024),
        ({f"{A}.ppo_micro_batch_size_per_gpu": 2, f"{A}.megatron.context_parallel_size": 4}, 512),
        ({f"{A}.use_dynamic_bsz": True, f"{A}.ppo_max_token_len_per_gpu": 600}, 1024),
    ],
)
def test_tokens_of_a_micro_batch(settings: dict[str, Any], tokens: int) -> None:
    """The prompts and responses of verl's defaults have 512 + 512 tokens."""
    assert ours(settings)["batch.max_tokens"] == tokens


def test_recomputing_of_both_backends() -> None:
    assert ours({})["model.recompute"] == "full"
    assert ours({f"{M}.enable_gradient_checkpointing": False})["model.recompute"] == "none"
    assert "model.recompute" not in ours({f"{A}.strategy": "megatron"})


def test_overrides_of_config_json() -> None:
    place = f"{M}.override_config"
    settings = {f"{place}.max_position_embeddings": 32768, f"{place}.attn_implementation": "flash_attention_2"}
    assert ours(settings)["model.overrides"] == {"max_position_embeddings": 32768}


def test_lora_and_fp16_are_lost() -> None:
    assert lost({f"{M}.lora_rank": 32}) == {f"{M}.lora_rank": True}
    assert lost({f"{M}.lora_rank": 0}) == {}
    assert lost({f"{A}.fsdp_config.dtype": "float16"}) == {f"{A}.fsdp_config.dtype": False}


def test_filtering() -> None:
    place = "algorithm.filter_groups"
    settings = {
        f"{place}.enable": True,
        "data.train_batch_size": 64,
        "data.gen_batch_size": 96,
        f"{place}.metric": "acc",
    }
    found = ours(settings, "recipe.dapo.main_dapo")
    keys = ("style", "train_batch_prompts", "gen_batch_prompts", "max_gen_batches", "carry_surplus")
    assert [found[f"sampling.{key}"] for key in keys] == ["filter", 64, 96, 1_000_000, False]
    assert ours({})["sampling.style"] == "none"
    assert "sampling.style" in asked(settings, "verl.trainer.main_ppo"), "verl's main_ppo reads no filter_groups"


def test_without_filtering_a_step_has_all_that_is_generated() -> None:
    """verl's loader gives batches of gen_batch_size, and nothing cuts them to train_batch_size."""
    found = ours({"data.train_batch_size": 32, "data.gen_batch_size": 96, f"{A}.ppo_mini_batch_size": 48})
    assert (found["sampling.train_batch_prompts"], found["batch.mini_batch_prompts"]) == (96, 48)
    assert "batch.mini_batch_prompts" in asked({"data.gen_batch_size": 96, f"{A}.ppo_mini_batch_size": 64})
    same = ours({"data.train_batch_size": 32, "data.gen_batch_size": 32, f"{A}.ppo_mini_batch_size": 32})
    assert same["sampling.train_batch_prompts"] == 32


def test_dtypes() -> None:
    fsdp = f"{A}.fsdp_config"
    assert ours({})["model.dtype"] == "bf16"
    assert ours({f"{fsdp}.dtype": "float32"})["model.dtype"] == "fp32"
    assert ours({f"{fsdp}.mixed_precision.param_dtype": "fp32"})["model.dtype"] == "fp32"
    (outcome,) = [one for one in imported({f"{fsdp}.model_dtype": "bf16"}).outcomes if one.ours == "model.dtype"]
    assert outcome.value == "bf16" and "half precision alone" in outcome.note
    assert lost({f"{R}.dtype": "float16"}) == {f"{R}.dtype": False}


def test_routers_that_do_not_train_are_lost() -> None:
    place = f"{M}.override_config.moe_config.freeze_moe_router"
    assert lost({place: False}) == {} and lost({place: True}) == {place: True}


def test_an_unknown_model_is_one_question() -> None:
    unknown = ForeignSetting(f"{M}.path", "${1}", "run.sh line 1", ("argument 1",))
    asked = convert(ForeignRun("verl", Path("run.sh"), "verl.trainer.main_ppo", "", (unknown,)), VERL).asked
    assert [key for key in asked if key.startswith("model.")] == ["model.path"]


def test_mini_batches_are_drawn_at_random_where_verl_draws_them() -> None:
    """dp_actor.py splits the batch in order; megatron_actor.py and the engines hand `shuffle` to a loader."""
    on = {f"{A}.shuffle": True}
    assert ours(on)["batch.shuffle"] is False
    assert ours({**on, f"{A}.strategy": "megatron"})["batch.shuffle"] is True
    assert ours({**on, "trainer.use_legacy_worker_impl": "disable"})["batch.shuffle"] is True


def test_code_of_the_tokenizer_is_code_of_the_model() -> None:
    assert ours({"data.trust_remote_code": True})["model.trust_remote_code"] is True
    assert ours({"data.trust_remote_code": True, f"{M}.trust_remote_code": False})["model.trust_remote_code"] is True
    assert ours({f"{M}.trust_remote_code": False})["model.trust_remote_code"] is False
    assert "model.trust_remote_code" not in ours({})


def test_profiled_steps() -> None:
    assert ours({"global_profiler.tool": "nsys", "global_profiler.steps": [2, 5]})["observe.profile_steps"] == [2, 5]
    assert "observe.profile_steps" not in ours({"global_profiler.steps": [2, 5]})


def test_losses_of_files_and_places() -> None:
    assert lost({"trainer.default_hdfs_dir": "hdfs://x", "trainer.device": "npu"}) == {
        "trainer.default_hdfs_dir": False,
        "trainer.device": False,
    }
    assert lost({"trainer.device": "cuda", "trainer.default_hdfs_dir": None}) == {}


def test_groups_filtered_by_another_number_are_lost_unless_they_are_the_same_groups() -> None:
    by_reward = {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "seq_reward"}
    assert lost(by_reward) == {}
    for changes in ({"reward_model.overlong_buffer.enable": True, "reward_model.overlong_buffer.len": 8},
                    {"custom_reward_function.path": "r.py"}, {"algorithm.filter_groups.metric": "score"}):  # fmt: skip
        assert lost({**by_reward, **changes}) == {"algorithm.filter_groups.metric": True}


def test_one_key_is_asked_for_the_length_of_a_run() -> None:
    for key, one in {
        "trainer.total_epochs": "num_epochs",
        "trainer.total_training_steps": "num_rollout_steps",
    }.items():
        unknown = ForeignSetting(key, "${N}", "run.sh line 1", ("N",))
        asked = convert(ForeignRun("verl", Path("run.sh"), "verl.trainer.main_ppo", "", (unknown,)), VERL).asked
        assert {"num_epochs", "num_rollout_steps"} & set(asked) == {one}


def test_checkpoints() -> None:
    found = ours({"trainer.save_freq": 20})
    assert (found["checkpoint.every"], found["checkpoint.keep"]) == (20, None)
    assert ours({"trainer.save_freq": -1})["checkpoint.every"] is None
    assert ours({"trainer.save_freq": 5, "trainer.max_actor_ckpt_to_keep": 3})["checkpoint.keep"] == 3
    assert ours({"trainer.save_freq": 5, "trainer.remove_previous_ckpt_in_save": True})["checkpoint.keep"] == 1
    assert ours({"trainer.resume_mode": "disable"})["checkpoint.resume"] == "never"
    path = {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": "/c/global_step_5"}
    assert lost(path) == {"trainer.resume_from_path": False}


def test_loggers() -> None:
    found = ours({"trainer.logger": ["console", "wandb", "mlflow"], "trainer.project_name": "math"})
    assert (found["observe.wandb_project"], found["observe.mlflow_experiment"]) == ("math", "math")
    assert lost({"trainer.logger": ["clearml"]}) == {"trainer.logger": False}


def test_prompts_of_steps() -> None:
    mini = f"{A}.ppo_mini_batch_size"
    assert ours({"data.train_batch_size": 8, mini: 32})["batch.mini_batch_prompts"] == 8
    assert "batch.mini_batch_prompts" in asked({"data.train_batch_size": 800, mini: 256})
    assert "sampling.train_batch_prompts" in asked({"data.train_batch_size": 0})


def test_samples_that_are_kept() -> None:
    found = ours({"trainer.rollout_data_dir": "/d/rollouts", "trainer.log_val_generations": 10})
    assert (found["observe.samples_per_step"], found["observe.eval_samples_per_set"]) == (1_000_000, 10)
    assert ours({"trainer.log_val_generations": -1})["observe.eval_samples_per_set"] is None
    assert ours({"trainer.validation_data_dir": "/d/val"})["observe.eval_samples_per_set"] is None
    assert "observe.eval_samples_per_set" not in ours({"trainer.log_val_generations": 0})


def test_packing_has_a_switch_per_backend() -> None:
    off = {f"{M}.use_remove_padding": False}
    assert ours(off)["batch.packing"] is False
    assert ours({**off, f"{A}.strategy": "megatron"})["batch.packing"] is True


def test_the_model_and_the_files_of_verls_own_defaults_are_asked_for() -> None:
    """They are placeholders, which a script relies on only where they could not be read in it."""
    assert {"model.path", "data.files"} <= imported({"algorithm.adv_estimator": "grpo", f"{R}.n": 8}).asked.keys()
