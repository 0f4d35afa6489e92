"""slime's table: what each of its flags becomes here, as of commit 624b824 (2026-08-21).

Change here: a flag of slime. Its name and our key are in config/foreign_names.py, its default in slime_defaults.py, and what follows
from several flags in slime_objective.py and slime_run.py.
"""

from __future__ import annotations

from functools import partial

from dapo_mcore.config.foreign_names import SLIME as NAMES
from dapo_mcore.foreign.table import Rule, Table, changed, combined, joined, lost, meaningless, run_name
from dapo_mcore.foreign.table import same as _same
from dapo_mcore.foreign.tables import slime_mis
from dapo_mcore.foreign.tables import slime_objective as objective
from dapo_mcore.foreign.tables import slime_run as run
from dapo_mcore.foreign.tables import slime_servers as servers
from dapo_mcore.foreign.tables.slime_defaults import slime_defaults

same = partial(_same, NAMES)

_SHAPE = (
    "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "kv-channels", "group-query-attention",
    "qk-layernorm", "normalization", "norm-epsilon", "position-embedding-type", "rotary-*", "use-rotary-position-embeddings", "rope-*",
    "swiglu", "untie-embeddings-and-output-weights", "vocab-size", "padded-vocab-size", "make-vocab-size-divisible-by", "disable-bias-linear",
    "add-qkv-bias", "add-bias-linear", "num-experts", "moe-ffn-hidden-size", "moe-layer-freq", "moe-router-score-function", "moe-router-topk*",
    "moe-router-num-groups", "moe-router-group-topk", "moe-router-pre-softmax",
    "moe-router-load-balancing-type", "moe-router-dtype", "moe-shared-expert-intermediate-size", "moe-grouped-gemm", "moe-token-drop-policy",
    "moe-token-dispatcher-type", "moe-permute-fusion", "moe-shared-expert-overlap", "multi-latent-attention", "q-lora-rank",
    "kv-lora-rank", "qk-head-dim", "qk-pos-emb-head-dim", "v-head-dim", "seq-length", "max-position-embeddings", "spec",
    "apply-layernorm-1p", "attention-output-gate", "post-self-attn-layernorm", "post-mlp-layernorm", "enable-experimental", "model-name",
    "no-bias-swiglu-fusion", "use-gated-attention", "moe-shared-expert-gate", "mscale", "mscale-all-dim", "no-position-embedding",
    "use-rope-scaling", "mtp-num-layers", "qwen-gdn-backend", "layernorm-epsilon", "experimental-attention-variant",
)  # fmt: skip
_TUNING = (
    "accumulate-allreduce-grads-in-fp32", "attention-softmax-in-fp32", "attention-backend",
    "no-check-for-nan-in-loss-and-grad", "bf16", "transformer-impl", "no-gradient-accumulation-fusion",
    "log-probs-chunk-size", "log-probs-max-tokens-per-gpu", "recompute-loss-function", "use-distributed-optimizer", "allgather-cp",
    "moe-enable-deepep", "moe-flex-dispatcher-backend", "decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers",
    "no-masked-softmax-fusion",
    "qkv-format", "megatron-deepgemm-*", "overlap-grad-reduce", "overlap-param-gather", "no-rope-fusion",
)  # fmt: skip
_OWN_PARTS = (
    "balance-data", "balance-by-flops", "use-dynamic-batch-size", "update-weight-*",
    "offload", "offload-train", "offload-rollout", "num-gpus-per-node", "train-env-vars", "rollout-health-check-*", "use-fault-tolerance",
    "distributed-backend", "distributed-timeout-minutes", "train-backend", "rollout-data-transport", "overlap-cpu-optimizer-d2h-h2d",
    "use-precision-aware-optimizer", "data-pad-size-multiplier", "http-proxy", "use-distributed-post", "metadata-key", "ci-*",
    "save-debug-rollout-data", "save-debug-train-data", "dump-details", "memory-*", "profile*", "use-pytorch-profiler", "record-memory-history", "tensorboard-dir",
    "check-weight-update-equal", "get-mismatch-metrics", "router-*", "seed", "no-load-optim", "no-load-rng", "finetune", "start-rollout-id",
    "release-train", "no-save-optim", "log-correct-samples", "log-multi-turn", "log-passrate",
    "log-reward-category", "loss-mask-type", "use-rollout-entropy", "custom-update-weight-post-write-path", "sglang-router-*",
    "fetch-trajectory-retry-times", "min-batch-collection-ratio", "rollout-task-type", "opsm-delta", "eval-max-context-len",
    "mtp-loss-scaling-factor", "opd-kl-coef", "opd-teacher-ckpt-step", "opd-teacher-load", "opd-type",
)  # fmt: skip

_RULES = (
    combined(run.length, "num_rollout_steps, num_epochs", "num-rollout", "num-epoch"),
    run_name("wandb-group"),
    same("rollout-seed"),
    same("deterministic-mode"),
    combined(run.saving, "output_dir, checkpoint.every, checkpoint.keep, checkpoint.export_every, checkpoint.async_save", "save", "save-interval", "save-hf", "async-save"),
    combined(run.model, "model.path, model.dtype, model.recompute, model.fp8", "hf-checkpoint", "recompute-granularity", "recompute-method",
             "recompute-modules", "recompute-num-layers", "fp8-format", "fp8-recipe"),
    changed(NAMES, lambda on: "scoring" if on else "none", "use-routing-replay"),
    same("tensor-model-parallel-size"),
    same("pipeline-model-parallel-size"),
    same("context-parallel-size"),
    same("expert-model-parallel-size"),
    same("expert-tensor-parallel-size"),
    combined(run.sequence_parallel, "parallel.sequence_parallel", "sequence-parallel"),
    combined(run.files, "data.files, data.chat_template, data.shuffle, data.deduplicate, data.max_prompt_tokens, data.on_long_prompt, data.limit, "
             "data.chat_template_kwargs",
             "prompt-data", "apply-chat-template", "apply-chat-template-kwargs", "rollout-shuffle", "rollout-max-prompt-len", "rollout-max-context-len"),
    same("input-key"),
    same("label-key"),
    same("n-samples-per-prompt"),
    same("rollout-max-response-len"),
    same("rollout-temperature"),
    same("rollout-top-p"),
    same("rollout-top-k"),
    joined("rollout.stop", "texts and ids in one list", "rollout-stop", "rollout-stop-token-ids"),
    combined(servers.server_places, "rollout.engine, rollout.sglang.tensor_parallel, rollout.sglang.colocated, rollout.sglang.sync, "
             "rollout.async_steps, reward.workers", "rollout-num-gpus-per-engine", "colocate", "sglang-pp-size", "sglang-pipeline-parallel-size"),
    combined(servers.num_servers, "rollout.sglang.num_servers", "rollout-num-gpus", "actor-num-nodes", "actor-num-gpus-per-node"),
    combined(servers.server_args, "rollout.sglang.server_args, rollout.sglang.max_in_flight", "sglang-*"),
    same("rollout-batch-size"),
    combined(objective.sampling, "sampling.style, sampling.gen_batch_prompts, sampling.max_gen_batches, sampling.carry_surplus, sampling.on_full, "
             "sampling.max_staleness", "dynamic-sampling-filter-path", "over-sampling-batch-size", "partial-rollout"),
    combined(objective.reward, "reward.function", "rm-type", "custom-rm-path", "reward-key"),
    combined(objective.estimator, "algo.advantage, algo.policy_loss, algo.advantage_std, algo.gamma, algo.lam, critic.clip, critic.warmup_steps, "
             "critic.optimizer.lr, critic.optimizer.weight_decay, critic.optimizer.beta1, critic.optimizer.beta2",
             "advantage-estimator", "disable-grpo-std-normalization", "gamma", "lambd", "value-clip", "num-critic-only-steps",
             "normalize-advantages"),
    combined(objective.clip, "algo.clip_low, algo.clip_high, algo.dual_clip, algo.loss_mode", "eps-clip", "eps-clip-high", "eps-clip-c",
             "calculate-per-token-loss"),
    combined(objective.kl, "algo.kl.coef, algo.kl.place, algo.kl.estimator", "use-kl-loss", "kl-loss-coef", "kl-loss-type", "kl-coef"),
    same("entropy-coef"),
    combined(objective.correction, "algo.tis.mode, algo.tis.lower, algo.tis.cap, algo.tis.level, algo.tis.normalize, algo.rejection, "
             "algo.rejection_divisor, algo.old_logprobs", "use-tis", "tis-clip", "tis-clip-low", "custom-tis-function-path",
             "use-rollout-logprobs", "keep-old-actor", *slime_mis.SETTINGS),
    Rule(("rollout-top-p",), (), objective.top_p, "log-probs are those of all tokens here, not of the nucleus", objective=True),
    combined(run.batch, "batch.mini_batch_prompts, batch.shuffle, batch.max_tokens", "global-batch-size", "num-steps-per-rollout",
             "max-tokens-per-gpu", "micro-batch-size"),
    same("lr"),
    combined(run.schedule, "optimizer.schedule, optimizer.warmup_updates, optimizer.min_lr, optimizer.decay_updates, "
             "optimizer.offload_fraction", "lr-decay-style", "lr-warmup-iters", "lr-warmup-fraction", "min-lr", "lr-decay-iters", "optimizer",
             "optimizer-cpu-offload", "optimizer-offload-fraction"),
    same("weight-decay"),
    same("adam-beta1"),
    same("adam-beta2"),
    same("adam-eps"),
    same("clip-grad"),
    combined(run.evaluation, "eval.every, eval.at_start, eval.sets, eval.temperature, eval.top_p, eval.top_k, eval.samples_per_prompt, "
             "eval.max_response_tokens", "eval-prompt-data", "eval-interval", "skip-eval-before-train", "eval-temperature", "eval-top-p",
             "eval-top-k", "n-samples-per-eval-prompt", "eval-max-response-len", "eval-max-prompt-len", "eval-input-key", "eval-label-key"),
    combined(run.loggers, "observe.tensorboard, observe.wandb_project", "use-tensorboard", "use-wandb", "wandb-project"),
    meaningless("the model's shape", "read from the model's config.json", *_SHAPE),
    meaningless("of Megatron", "as here, or chosen here by the device", *_TUNING),
    meaningless("slime's own parts", "they have no counterpart, and change no number", *_OWN_PARTS),
    meaningless("copies of the model", "a run starts from model.path and goes on from its own checkpoints; the reference is model.path",
                "load", "ref-load", "ref-ckpt-step", "critic-load", "critic-save"),
    meaningless("of wandb", "the run's name is its name there, too", "wandb-*", "disable-wandb-random-suffix", "tb-*"),
    lost("samples of one step are all trained on; nearest: algo.rejection", "use-opsm", objective=True),
    lost("no teacher's KL; nearest: a reward function", "use-opd", objective=True),
    lost("the KL has no importance weight here; nearest: without use-unbiased-kl", "use-unbiased-kl", objective=True),
    lost("rewards are compared within a group here", "disable-rewards-normalization",
         "disable-compute-advantages-and-returns", objective=True),
    lost("code of your own in the objective; nearest: reward.function path.py:name", "custom-loss-function-path",
         "custom-advantage-function-path", "custom-pg-loss-reducer-function-path", "custom-reward-post-process-path",
         "group-rm", "rm-url", "custom-convert-samples-to-train-data-path", "rollout-sample-filter-path", "buffer-filter-path",
         "mask-offpolicy-in-partial-rollout", "rollout-sample-hook-path", "rollout-data-postprocess-path",
         "custom-megatron-before-log-prob-hook-path", "custom-megatron-before-train-step-hook-path", "custom-model-provider-path", objective=True),
    lost("the reference stays the starting policy", "ref-update-interval", objective=True),
    lost("a file whose values replace flags; nearest: the flags themselves in a copy of the script", "custom-config-path", objective=True),
    lost("a file with flags of the policy or the critic; nearest: the flags themselves, section critic", "megatron-config-path", objective=True),
    lost("evaluation sets in a file of their own; nearest: write them below eval.sets", "eval-config"),
    lost("evaluation by code of your own", "eval-function-path"),
    lost("a response to an evaluation prompt may be short here", "eval-min-new-tokens"),
    lost("metrics by code of your own", "custom-rollout-log-function-path", "custom-eval-rollout-log-function-path", "custom-megatron-init-path",
         "rollout-all-samples-process-path"),
    lost("schemas of tools in the prompts come from a column there, from section tools here", "tool-key", "eval-tool-key", objective=True),
    lost("rewards read responses without control tokens", "rollout-skip-special-tokens", off=(None, False, True)),
    lost("Adam keeps its moments over the run", "reset-optimizer-states", "use-stateless-adam"),
    lost("all weights train; nearest: lr", "only-train-params-name-list", "freeze-params-name-list", "freeze-indexer"),
    lost("heads that predict further tokens are not trained", "enable-mtp-training"),
    lost("servers of several kinds, or elsewhere; nearest: rollout.sglang.urls", "sglang-config", "prefill-num-servers",
         "rollout-external-engine-addrs"),
    lost("weights are bf16 here", "fp16"),
    lost("warm-up begins at lr 0", "lr-warmup-init", off=(None, 0)),
    lost("images are not read: the policy would see the text alone", "multimodal-keys", objective=True),
    lost("another loss than the policy's; nearest for sft_loss: the demonstrations of section warm_start", "loss-type", off=(None, "policy_loss"), objective=True),
    lost("the reward in evaluation is the one of training", "eval-reward-key", off=(None, "acc")),
    lost("generation by code of your own, such as tools; nearest: sections tools and agent", "custom-generate-function-path",
         "rollout-function-path", "data-source-path", "rollout-buffer-url", "disable-rollout-global-dataset", objective=True),
    lost("dropout is 0 here; slime takes Megatron's 0.1 unless the script says 0", "attention-dropout", "hidden-dropout", off=(0,),
         objective=True),
    lost("no balancing loss of routers is carried over; nearest: model.moe_aux_loss_coef", "moe-aux-loss-coeff", off=(None, 0), objective=True),
    Rule(("moe-router-bias-update-rate", "moe-router-enable-expert-bias"), (), objective.router_bias, "the bias of routers stays as it is", objective=True),
    lost("weights reach the servers after each step", "update-weights-interval", off=(None, 1), objective=True),
    lost("a run generates and trains, always", "debug-rollout-only", "debug-train-only", "load-debug-rollout-data",
         "load-debug-rollout-data-subsample", "load-forge-rollout-data", objective=True),
    lost("gradients are summed in fp32", "grad-reduce-in-bf16"),
    lost("the engine's routes are not replayed; nearest: model.routing_replay scoring", "use-rollout-routing-replay"),
)  # fmt: skip

SLIME = Table("slime", "slime 624b824 (2026-08-21)", slime_defaults, _RULES)
