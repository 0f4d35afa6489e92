"""Rules between sections."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dapo_mcore.config.file import load_config
from dapo_mcore.errors import ConfigError

LONG = ["data.max_prompt_tokens=100", "rollout.max_response_tokens=205", "parallel.context_parallel=3"]


AHEAD = ["rollout.engine=sglang", "rollout.async_steps=1", "reward.workers=1"]


KEEP = ["rollout.engine=sglang", "sampling.on_full=keep", "algo.old_logprobs=rollout"]


GATHER = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]


SERVERS = ["rollout.engine=sglang"]


CLUSTER = [*SERVERS, "rollout.sglang.placement=ray", "ray.address=10.0.0.1:6379"]


RULES: list[tuple[list[str], str]] = [
    (
        [*SERVERS, "rollout.sglang.server_args={context_length: 22529}"],
        "server_args context-length 22529 is too short: the longest sequence is data.max_prompt_tokens + rollout.max_response_tokens = "
        "22528 tokens, and SGLang leaves 2 positions empty; give at least 22530, or leave context-length out",
    ),
    (
        [*SERVERS, "rollout.sglang.server_args={max-total-tokens: '65536'}"],
        "server_args max-total-tokens is '65536'; give a whole number of tokens, without quotes",
    ),
    (
        [
            *SERVERS,
            "rollout.sglang.server_args={max-total-tokens: 30000}",
            "eval.sets={a: {files: f, max_prompt_tokens: 1000}}",
            "eval.max_response_tokens=32768",
        ],
        "server_args max-total-tokens 30000 is too short: the longest sequence is eval.sets.a.max_prompt_tokens + "
        "eval.max_response_tokens = 33768 tokens",
    ),
    (
        ["checkpoint.keep_best=1"],
        "keep_best 1 keeps the checkpoints with the best best_metric, which is null; set both",
    ),
    (
        ["checkpoint.best_metric=reward/mean"],
        "keep_best 0 keeps the checkpoints with the best best_metric, which is reward/mean",
    ),
    (
        ["checkpoint.keep_best=1", "checkpoint.best_metric=val/amie/mean@8"],
        "checkpoint.best_metric val/amie/mean@8 is of no set of eval.sets (there is none); a metric of set NAME is val/NAME/mean@k",
    ),
    (
        ["checkpoint.keep_best=1", "checkpoint.best_metric=val/a/mean@32", "eval.sets={a: {files: f}}"],
        "val/a/mean@32 is of 32 samples per prompt, but samples_per_prompt of eval.sets.a is 8; set val/a/mean@8",
    ),
    (
        ["reward.by_source={mine: gsm8k}"],
        "reward.by_source has rules of data sources, but reward.function is math_dapo; set reward.function by_source",
    ),
    (
        ["reward.workers=0", "eval.sets={a: {files: f, reward_function: math_verify}}"],
        "eval.sets.a.reward_function math_verify: function math_verify needs workers of at least 1",
    ),
    (
        ["model.recompute=full", "model.offload_activations=true", "megatron.distribute_saved_activations=true"],
        "megatron.distribute_saved_activations would keep them elsewhere or in part; use one of the two",
    ),
    (
        ["optimizer.offload_fraction=0.5"],
        "optimizer.offload_fraction and moments in bf16 are for models in bf16, but model.dtype is fp32; set model.dtype bf16",
    ),
    (
        ["sampling.train_batch_prompts=12", "batch.mini_batch_prompts=5"],
        "batch.mini_batch_prompts 5 does not divide sampling.train_batch_prompts 12; use one of 1, 2, 3, 4, 6, 12",
    ),
    (
        [*LONG, "batch.max_tokens=100"],
        "data.max_prompt_tokens 100 + rollout.max_response_tokens 205 = 305 tokens, "
        "but a micro-batch holds batch.max_tokens 100 ",
    ),
    ([*GATHER, "optimizer.distributed=false"], "overlap_param_gather needs optimizer.distributed true"),
    ([*GATHER, "megatron.moe_shared_expert_overlap=true"], "calls parts of the shared experts without one"),
    (
        ["parallel={pipeline_parallel: 2, virtual_pipeline_parallel: 2}", "megatron.deallocate_pipeline_outputs=true"],
        "deallocate_pipeline_outputs with parallel.virtual_pipeline_parallel 2: megatron-core 0.16 would free outputs",
    ),
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel needs tensor_parallel > 1, but it is 1"),
    (
        [*LONG, "batch.max_tokens=100"],
        "context_parallel 3 = 300; raise batch.max_tokens to 102 or shorten the prompts or responses",
    ),
    (
        ["reward.overlong.penalty=true", "rollout.max_response_tokens=1000"],
        "reward.overlong.cache 4096 exceeds the maximal length 1000",
    ),
    (["algo.old_logprobs=rollout", "algo.tis.mode=truncate"], "use tis.mode mask or off"),
    (
        ["model.routing_replay=scoring", "algo.old_logprobs=rollout", "algo.max_mismatch=null"],
        "model.routing_replay scoring replays the routes of a scoring pass, but algo.old_logprobs rollout with algo.tis.mode off",
    ),
    (["algo.old_logprobs=rollout", "algo.tis.mode=icepop"], "algo.tis.mode icepop needs algo.old_logprobs actor"),
    (
        ["algo.tis.mode=mask", "algo.tis.cap=0.5"],
        "no token meets that at cap 0.5; use a cap of at least 1, or set lower",
    ),
    (["algo.policy_loss=cispo", "algo.dual_clip=3"], "cispo has no such bound: leave it out"),
    (["algo.policy_loss=kl_cov", "algo.dual_clip=3"], "kl_cov has no such bound: leave it out"),
    (
        ["algo.kl_cov.ratio=0.1"],
        "algo.kl_cov is without effect with algo.policy_loss clip; leave it out, or set policy_loss kl_cov",
    ),
    (
        ["algo.policy_loss=kl_cov", "algo.clip_cov.lower=0"],
        "algo.clip_cov is without effect with algo.policy_loss kl_cov",
    ),
    (
        ["algo.policy_loss=clip_cov", "algo.clip_cov.lower=5"],
        "lower 5.0 must be below upper 5.0: no token lies between them",
    ),
    (
        ["algo.tis.level=sequence"],
        "algo.tis.level sequence is without effect with algo.tis.mode off; set another mode",
    ),
    (
        ["algo.tis.mode=mask", "algo.tis.normalize=true"],
        "but the mode is mask; set mode truncate, or leave normalize out",
    ),
    (
        ["algo.entropy_coef=0.01", "algo.adaptive_entropy={target: 0.2}"],
        "algo.entropy_coef 0.01 is the first value of algo.adaptive_entropy, which keeps it between min_coef 0.0 and max_coef 0.005",
    ),
    (
        ["algo.adaptive_entropy={target: 0.2, min_coef: 0.01}"],
        "min_coef 0.01 exceeds max_coef 0.005; exchange them",
    ),
    (["algo.policy_loss=gspo"], "set algo.loss_mode seq-mean-token-mean (now token-mean)"),
    (
        ["optimizer.schedule=cosine", "optimizer.decay_updates=10"],
        "optimizer.schedule cosine: its length of 10 gradient steps (decay_updates or decay_rollout_steps) includes the warm-up of 10 "
        "and must be above it",
    ),
    (["optimizer.schedule=cosine"], "optimizer.schedule cosine needs optimizer.decay_updates"),
    (["rollout.group_size=1"], "rollout.group_size is 1; use at least 2, or sampling.style none"),
    (
        ["sampling.style=resample", "sampling.max_samples_per_prompt=8"],
        "sampling.max_samples_per_prompt 8 is below rollout.group_size 16; raise it to at least 16",
    ),
    (["rollout.async_steps=1"], "rollout.async_steps 1 needs rollout.engine sglang: the embedded engine"),
    (["sampling.on_full=abort"], "sampling.on_full abort needs rollout.engine sglang"),
    (["sampling.on_full=keep"], "sampling.on_full keep needs rollout.engine sglang"),
    (["sampling.max_in_flight_groups=8"], "sampling.max_in_flight_groups needs rollout.engine sglang"),
    (
        ["rollout.engine=sglang", "sampling.on_full=keep"],
        "sampling.on_full keep trains on samples of weights one version older or more; correct for it with algo.tis.mode",
    ),
    (
        [*KEEP, "sampling.max_staleness=0"],
        "max_staleness 0 with rollout.async_steps 0 lets none live that long; use at least 1",
    ),
    (
        [*KEEP, *AHEAD, "sampling.max_staleness=1"],
        "max_staleness 1 with rollout.async_steps 1 lets none live that long; use at least 2",
    ),
    (
        [*KEEP, "sampling.max_staleness=3", *AHEAD, "sampling.max_in_flight_groups=3073"],
        "more than gen_batch_prompts 1536 × (max_staleness 3 - async_steps 1) = 3072 groups in flight would be too old",
    ),
    (
        [*KEEP, "sampling.style=none", "sampling.max_in_flight_groups=513"],
        "more than train_batch_prompts 512 × (max_staleness 1 - async_steps 0) = 512 groups in flight would be too old",
    ),
    ([*KEEP, "sampling.carry_surplus=false"], "carry_surplus false throws away what a step has beyond its batch"),
    (
        [*KEEP, "rollout.sglang={urls: ['http://a:1'], router_url: 'http://a:2'}"],
        "sampling.on_full keep must know which server works on a request",
    ),
    (
        [*AHEAD, "algo.tis.mode=mask", "reward.workers=0"],
        "but reward.workers 0 (the default of math_dapo) would run the reward function in a thread",
    ),
    (AHEAD, "correct for it with algo.tis.mode truncate or mask, or with algo.old_logprobs rollout"),
    (
        [*AHEAD, "algo.tis.mode=truncate", "sampling.max_staleness=0"],
        "sampling.max_staleness 0 is below rollout.async_steps 1: every group would be dropped as stale; use at least 1",
    ),
    (["observe.record_keep=9"], "observe.record_keep 9 keeps nothing without observe.record; set observe.record true"),
    (
        ["observe.record=true", "observe.record_keep=9", "checkpoint.every=10"],
        "observe.record_keep 9 is below checkpoint.every 10, and a replay needs the tokens of all steps since a checkpoint",
    ),
    (
        ["observe.profile_steps=[2,30]", "num_rollout_steps=20"],
        "observe.profile_steps has 30, but the run ends at num_rollout_steps 20; name earlier steps",
    ),
]


RULES += [
    (CLUSTER, "host 127.0.0.1 does not go with rollout.sglang.placement ray and ray.address 10.0.0.1:6379"),
    (
        [*SERVERS, "rollout.sglang.host=node"],
        "host node does not go with rollout.sglang.placement local and ray.address None",
    ),
    (
        [*CLUSTER, "rollout.sglang={host: node, num_servers: 4, sync: tensor, placement: ray}"],
        "placement ray spreads num_servers 4 over nodes that may be others; use placement nodes, or sync distributed",
    ),
    ([*SERVERS, "rollout.sglang.placement=nodes"], "host 127.0.0.1 does not go with rollout.sglang.placement nodes"),
]


@pytest.mark.parametrize(("overrides", "message"), RULES)
def test_a_rule_between_sections_says_its_numbers(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(file, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampling.train_batch_prompts=12", "batch.mini_batch_prompts=6"],
        ["parallel.sequence_parallel=true", "parallel.tensor_parallel=2"],
        [*GATHER, "megatron.moe_shared_expert_overlap=false"],
        ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline_parallel=2"],
        [*LONG, "batch.max_tokens=102"],
        ["reward.overlong.penalty=true", "rollout.max_response_tokens=4096"],
        ["algo.old_logprobs=rollout", "algo.tis.mode=mask"],
        ["model.routing_replay=scoring", "algo.old_logprobs=rollout", "algo.rejection=[{level: token, upper: 2}]"],
        ["optimizer.schedule=cosine", "optimizer.decay_updates=11"],
        ["model.overrides={num_hidden_layers: 2}", "model.init=random"],
        ["rollout.group_size=1", "sampling.style=none"],
        ["sampling.style=resample", "sampling.max_samples_per_prompt=16"],
        [*AHEAD, "algo.tis.mode=truncate"],
        [*AHEAD, "algo.old_logprobs=rollout", "sampling.on_full=abort", "sampling.max_in_flight_groups=8"],
        [*KEEP, "sampling.max_in_flight_groups=1536"],
        [*KEEP, *AHEAD, "sampling.max_staleness=2"],
        ["rollout.engine=sglang", "sampling.on_full=keep", "algo.tis.mode=mask"],
        [*CLUSTER, "rollout.sglang.host=node", "rollout.sglang.sync=distributed"],
        [*SERVERS, "rollout.sglang.placement=ray", "rollout.sglang.sync=tensor"],
        ["rollout.engine=embedded", "rollout.sglang.host=node"],  # it starts no servers
    ],
)
def test_the_remedy_of_each_rule_works(file: Path, overrides: list[str]) -> None:
    load_config(file, overrides)
