"""The sections about generation, batches, checkpoints and observation: frozen, typed, each checked on its own.

Change here: what a user may set, its default, and a rule inside one section. The types of fields are in values.py, other sections
in the files of their names (`model` in model.py), and rules between sections in rules.py. Every default is in this folder: the
stages that use a section fill in none.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, StrictInt, StrictStr, field_validator, model_validator

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.config.values import Count, ResumeChoice, Section, Steps, Temperature, Tokens, TopK, TopP, TwoUnits

StopList = Annotated[
    list[StrictStr | StrictInt], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
"""Texts and token ids; one text stands for itself."""
_MOST_STOPS = 32
"""SGLang's MAX_STOP_COUNT (srt/sampling/sampling_params.py of 0.5.21)."""


class RolloutConfig(Section):
    """Generation: the engine, and how training rollouts are sampled."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """`embedded` generates in the controller's process; `sglang` on servers."""
    group_size: Count = 16
    """Responses per prompt (G, verl's n)."""
    max_response_tokens: Tokens = 20480
    """Longest response; a longer one is cut and counts as overlong."""
    temperature: Temperature = 1.0
    """Log-probs are taken at this temperature in training, too."""
    top_p: TopP = 1.0
    """Nucleus sampling: draw from the most probable tokens that together have this probability; 1: from all."""
    top_k: TopK = -1
    """Draw from the k most probable tokens; -1: from all."""
    stop: StopList = Field(default_factory=list)
    """Texts or token ids that end a response, beside the model's own stop tokens and the chat template's end of turn. They hold in
    evaluation and for each turn with tools, too; one that ends with a call's end does not end the response. What ended a response
    stays in it, as drawn. A text may span several tokens and begin or end inside one; one that is the name of a control token,
    such as <|im_end|>, is that token. SGLang servers then have a tokenizer; those of `sglang.urls` must be started without
    --skip-tokenizer-init."""
    max_batch: Count = 1024
    """Embedded engine: sequences decoded at once."""
    async_steps: int = Field(0, ge=0, le=1)
    """1: servers generate the next step's groups while the ranks train on this step's, which are one version older.
    A resumed run generates them again, with the newest weights, so it is not bit by bit the run that was not interrupted."""
    num_threads: Count | None = None
    """Embedded engine: CPU threads while generating; None takes all cores."""
    sglang: SGLangConfig = SGLangConfig()

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: list[str | int]) -> list[str | int]:
        if len(stop) > _MOST_STOPS:
            raise ValueError(
                f"at most {_MOST_STOPS} texts and ids end a response, as on SGLang servers; there are {len(stop)}"
            )
        for one in stop:
            if one == "" or "\ufffd" in str(one) or (isinstance(one, int) and one < 0):
                raise ValueError(
                    f"a stop is a text of one or more characters or a token id from 0 on, not {one!r}; correct it"
                )
        return stop


class SamplingConfig(Section):
    """Which groups a rollout step trains on: dynamic sampling (paper section 3.2)."""

    style: Literal["none", "filter", "resample"] = "filter"
    """`filter` drops groups whose answers are all right or all wrong, and refills (verl's filter_groups). `resample` adds responses to such
    groups instead. `none` trains on all groups."""
    train_batch_prompts: Count = 512
    """Groups trained on per rollout step."""
    gen_batch_prompts: Count = 1536
    """Prompts per generation batch of filter-and-refill."""
    max_gen_batches: Count = 10
    """Generation batches per rollout step, after which on_exhausted decides."""
    on_exhausted: Literal["error", "train_on_what_we_have"] = "error"
    """After max_gen_batches without enough groups: end with an error, or train on those there are."""
    carry_surplus: bool = True
    """Keep groups beyond train_batch_prompts for the next rollout step."""
    max_staleness: int = Field(1, ge=0, le=1000)
    """Weight versions a group may be behind the policy that trains on it; older ones are dropped and counted."""
    max_in_flight_groups: Count | None = None
    """Engine `sglang`: groups in flight at a time. null: gen_batch_prompts, or train_batch_prompts if nothing is filtered."""
    on_full: Literal["wait", "abort", "keep"] = "wait"
    """Engine `sglang`: what happens to groups in flight once enough groups are kept. `wait`: finish them and carry the surplus.
    `abort`: end them and generate their prompts again in the next step; this is faster but favours short responses. `keep`:
    they continue under the new weights after the sync (partial rollouts). Then the step waits only for groups that would
    become older than max_staleness, so no response is lost because it is long."""
    resample_size: Count = 1
    """Style `resample`: responses that are added per round to a group whose answers do not vary."""
    max_samples_per_prompt: Count = 64
    """Style `resample`: a group that reaches this size without varying is given up."""


class RayConfig(Section):
    """The Ray cluster of servers and reward workers whose `placement` is `ray`."""

    address: str | None = None
    """Address of a running cluster. Start its nodes with RAY_AUTH_MODE=token and RAY_worker_niceness=0. null starts a cluster
    on this machine."""


class BatchConfig(Section):
    """How a rollout step's groups become gradient steps and micro-batches."""

    two_units: ClassVar[tuple[TwoUnits, ...]] = (TwoUnits("mini_batch_prompts", "mini_batch_samples", default=32),)

    mini_batch_prompts: Count | None = None
    """Groups per gradient step; train_batch_prompts / mini_batch_prompts gradient steps per rollout step. null: as
    `mini_batch_samples` says, or 32."""
    mini_batch_samples: int | None = Field(None, ge=1, le=1_000_000_000)
    """The same in responses, as slime and NeMo-RL count: mini_batch_prompts × rollout.group_size. Set one of the two. `dapo-mcore
    config` prints what follows as `mini_batch_prompts`."""
    max_tokens: Tokens = 22528
    """Token budget of one micro-batch on one context-parallel rank."""
    packing: bool = True
    """False: right-padded rectangles instead of packed (THD) sequences."""
    epochs: int = Field(1, ge=1, le=1000)
    """Passes over the samples of a rollout step."""
    shuffle: bool = True
    """Draw the mini-batches of a rollout step in random order."""
    feeder: Literal["plain", "dali"] = "plain"
    """How micro-batches get to the GPU, two ahead of their use, bit for bit the same. plain: one copy each from pinned memory, on a
    stream of its own. dali: NVIDIA DALI's external source (extra `dali`, 0.6 GB). Use plain: micro-batches come packed, so DALI
    has nothing to do but copy them, and takes 2 to 10 times the host's time (1 to 2 ms each against 0.2 to 0.4, on a CPU)."""
    head_chunk_tokens: Tokens = 1024
    """Rows of the policy head projected to the vocabulary at a time."""
    head_eager_grad: bool = True
    """Add the output matrix's gradient to Megatron's fp32 main_grad in the forward pass: saves a copy of that matrix and,
    in bf16, a rounding. False keeps it until the backward pass."""


class CheckpointConfig(Section):
    """Saving, resuming and exporting. Steps are rollout steps."""

    every: int | None = Field(None, ge=1)
    """Save every this many rollout steps. null: only as `at_end` says."""
    at_end: bool = True
    """Save after the last step, and when a signal ends the run. False with `every` null never saves."""
    keep: int | None = Field(2, ge=1)
    """Newest checkpoints that are kept. null: all."""
    keep_best: int = Field(0, ge=0)
    """Checkpoints with the best `best_metric` that are kept, too. Only the metrics of a checkpoint's own rollout step count, so set
    eval.every so that it divides `every`; a checkpoint without the metric, or where it is not finite, is none of the best. Of equal
    ones the later is better. A run that resumes with another metric reads it from the checkpoints."""
    best_metric: str | None = Field(None, min_length=1)
    """Name of a metric as in metrics.jsonl, such as val/aime/mean@32."""
    best_mode: Literal["max", "min"] = "max"
    """Whether a higher or a lower best_metric is better."""
    async_save: bool = False
    """Write the checkpoints of `every` beside training: it waits only while each rank copies its part into host memory, where the
    part stays (14 bytes a parameter of the model, over all ranks). The last checkpoint is waited for. If such a save fails, the
    next one says so and is waited for."""
    keep_rollouts: bool = False
    """When a signal or the stop file ends the run in the midst of a rollout or before its first gradient step, save the groups that are
    generated and scored; the resumed run trains on them. Saves up to the time of a rollout. The run then differs from an
    uninterrupted one, and responses that were finished come before longer ones. Keeps one step's samples in rank 0's memory while
    it trains. What async_steps has generated ahead is not kept."""
    resume: ResumeChoice = "auto"
    """auto: go on from the newest checkpoint; if it is damaged, from the one before. A rollout step, or the path of a checkpoint
    (a folder step_N, also of another run): go back to that one. Newer checkpoints of this run are set aside, not deleted. Later
    starts with the same choice go on from what was saved since. never: start anew."""
    export_every: Steps | None = None
    """Rollout steps between exports in Hugging Face's format; null: none on the way."""
    export_at_end: bool = True
    """Export the last weights in Hugging Face's format."""

    @model_validator(mode="after")
    def _check_fields(self) -> CheckpointConfig:
        if self.async_save and self.every is None:
            raise ValueError(
                "async_save is for the checkpoints of every, which is null: set every, or async_save false (the last checkpoint "
                "is always waited for)"
            )
        if (self.keep_best > 0) != (self.best_metric is not None):
            raise ValueError(
                f"keep_best {self.keep_best} keeps the checkpoints with the best best_metric, which is "
                f"{self.best_metric or 'null'}; set both, such as keep_best 1 and best_metric val/aime/mean@32, or neither"
            )
        if self.keep_rollouts and not self.at_end:
            raise ValueError(
                "keep_rollouts true saves an unfinished rollout when a run is ended, but with at_end false nothing is saved then; "
                "set at_end true, or keep_rollouts false"
            )
        return self


class ObserveConfig(Section):
    """What a run writes besides its weights."""

    tensorboard: bool = True
    """Write event files for TensorBoard."""
    wandb_project: str | None = Field(None, min_length=1, max_length=128)
    """Project on Weights & Biases (needs the extra `wandb`); null: not used."""
    mlflow_experiment: str | None = Field(None, min_length=1, max_length=128)
    """Experiment at MLFLOW_TRACKING_URI (extra `mlflow`). All outputs may be on at once."""
    swanlab_project: str | None = Field(None, min_length=1, max_length=100)
    """Extra `swanlab`; SWANLAB_MODE=offline keeps the numbers in the run's folder."""
    samples_per_step: int = Field(4, ge=0, le=1_000_000)
    """Responses of each rollout step that are written to samples/step_000003.jsonl, right and wrong ones in turn."""
    eval_samples_per_set: int | None = Field(4, ge=0, le=1_000_000_000)
    """Responses of each evaluation set that are written to samples/eval/step_000003.jsonl, as above. null: all, as with verl's
    trainer.validation_data_dir."""
    plot_at_end: bool = True
    """Draw the run's metrics to plots in its folder at the end."""
    profile_steps: list[Steps] = Field(default_factory=list)
    """Rollout steps whose scoring and gradient steps rank 0 records with torch.profiler, in profile/step_000003.json.gz. Such a
    step is slower, and of a large model its trace has hundreds of MB."""
    record: bool = False
    """Keep of each rollout step, in record/, what it trained on and digests of log-probs, gradients and weights, so that
    `dapo-mcore replay` can repeat it. Changes no number. Costs a pass over gradients and weights per gradient step, and on rank
    0's disk 9 bytes per token, which are hashed, too; training waits for all of it (`time/record_s`)."""
    record_keep: Steps | None = None
    """Rollout steps whose tokens are kept; null keeps all. Digests and metrics of all steps stay. A replay needs the tokens of
    all steps since a checkpoint."""
