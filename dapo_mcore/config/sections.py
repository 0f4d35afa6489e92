"""The sections of a configuration: frozen, typed, each checked on its own.

Change here: what a user may set, its default, and a rule inside one section. The types of fields are in values.py, the sections
`model`, `parallel` and `optimizer` are in model.py, parallel.py and optimizer.py, `rollout.sglang` in sglang.py, and rules
between sections in schema.py. Every default is in these files: the stages that use a section fill in none.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dapo_mcore.config.sglang import SGLangConfig
from dapo_mcore.config.values import (
    AnswerPattern,
    Count,
    FilePath,
    FilePaths,
    LearningRate,
    Name,
    PromptTemplate,
    ResumeChoice,
    Seconds,
    Section,
    Seed,
    Steps,
    Temperature,
    Text,
    Tokens,
)

LossMode = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-mean-microbatch"
]


class DataConfig(Section):
    """Training prompts: JSONL or parquet rows, rendered to tokens."""

    files: FilePaths
    prompt_key: str = "prompt"
    """A column with text, or with a chat: [{role, content}, …]."""
    answer_key: str = "reward_model.ground_truth"
    """A column name; dots descend into nested objects."""
    answer_pattern: AnswerPattern | None = None
    """Regular expression whose first group is the answer, for instance `#### (.+)` for GSM8K."""
    source_key: str | None = "data_source"
    """The column that reward functions dispatch on. Only the default one may be absent."""
    prompt_template: PromptTemplate = "{prompt}"
    """Text around a plain-text prompt; {prompt} is replaced."""
    chat_template: bool | FilePath = False
    """False: plain text. True: the tokenizer's template (`default` if it has several). Otherwise the name of one of its
    templates, or the path of a Jinja file."""
    system_prompt: Text | None = None
    add_bos: bool = False
    """Plain text only: put the tokenizer's BOS token first."""
    max_prompt_tokens: Tokens = 2048
    on_long_prompt: Literal["truncate_left", "drop", "error"] = "truncate_left"
    on_bad_row: Literal["error", "skip"] = "error"
    deduplicate: bool = True
    shuffle: bool = True
    limit: Steps | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> DataConfig:
        if self.system_prompt is not None and self.chat_template is False:
            raise ValueError("system_prompt needs a chat template; set chat_template, or drop the prompt")
        if self.add_bos and self.chat_template is not False:
            raise ValueError("add_bos is for plain text; a chat template writes its own BOS: set add_bos false")
        return self


class RolloutConfig(Section):
    """Generation: the engine, and how training rollouts are sampled."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """`embedded` generates in the controller's process; `sglang` on servers."""
    group_size: Count = 16
    """Responses per prompt (G, verl's n)."""
    max_response_tokens: Tokens = 20480
    temperature: Temperature = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    """Draw from the k most probable tokens; -1: from all."""
    max_batch: Count = 1024
    """Embedded engine: sequences decoded at once."""
    async_steps: int = Field(0, ge=0, le=1)
    """1: servers generate the next step's groups while the ranks train on this step's, which are one version older."""
    num_threads: Count | None = None
    """Embedded engine: CPU threads while generating; None takes all cores."""
    sglang: SGLangConfig = SGLangConfig()

    @field_validator("top_k")
    @classmethod
    def _draws_from_something(cls, value: int) -> int:
        if value == 0:
            raise ValueError("top_k 0 leaves no token to draw; use -1 for all of them, or at least 1")
        return value


class SamplingConfig(Section):
    """Which groups a rollout step trains on: dynamic sampling (paper section 3.2)."""

    style: Literal["none", "filter", "resample"] = "filter"
    train_batch_prompts: Count = 512
    """Groups trained on per rollout step."""
    gen_batch_prompts: Count = 1536
    """Prompts per generation batch of filter-and-refill."""
    max_gen_batches: Count = 10
    on_exhausted: Literal["error", "train_on_what_we_have"] = "error"
    carry_surplus: bool = True
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


class OverlongConfig(Section):
    """Soft overlong punishment (paper eq. 13) and overlong filtering."""

    penalty: bool = False
    max_length: Tokens | None = None
    """L_max in response tokens; None means rollout.max_response_tokens."""
    cache: Tokens = 4096
    """L_cache in tokens: the penalty grows from 0 to -factor over the last `cache` tokens."""
    factor: float = Field(1.0, gt=0, le=1000)
    count_tool_output: bool = False
    """The penalty's length has the output of tools, too, as in verl: then a tool that prints much costs reward. False: only
    tokens that the policy wrote."""
    filter: bool = False
    """Mask the tokens of truncated responses out of the loss, with tools also of those that agent.max_turns has ended."""


class RewardConfig(Section):
    """Scoring of one response."""

    function: FilePath = "math_dapo"
    """`math_dapo`, `math_verify`, or an import path `package.module:function` / `path/to/file.py:function`.

    `math_dapo` is the paper's rule, as in verl: the text after `Answer:` in normal form. It takes `Answer: 1, 2` for 12 and
    `Answer: 3 = 12`, too, and does not take `**Answer: 12**`, `\\(12\\)` and `12.0`, which chat models like to write.
    `math_verify` asks Hugging Face's grader, which compares values, where that rule says no (extra `math`)."""
    adapter: Literal["verl", "trl"] = "verl"
    """Calling convention of an imported function."""
    strict_box: bool = False
    """math_dapo only: compare the last \\boxed{} of the last 100 characters literally."""
    workers: int | None = Field(None, ge=0, le=10_000)
    """n > 0 scores in n processes with a deadline of timeout_seconds; 0 in the controller process without a deadline: a
    function that hangs then stops the run. null: 0 for math_dapo, which cannot hang, and 1 for any other function."""
    placement: Literal["local", "ray"] = "local"
    """Where the worker processes run: on this machine, or on the nodes of the Ray cluster (section `ray`)."""
    timeout_seconds: Seconds = 30.0
    on_failure: Literal["mask", "value"] = "mask"
    """A sample whose scoring failed is left out of statistics and loss (`mask`), or its score is `failure_value`. It is counted
    in both cases. A step in which all scores failed ends the run."""
    failure_value: float = Field(-1.0, ge=-1000, le=1000)
    filter_void: bool = False
    """Mask responses without an answer, and such without a token of the policy, out of the loss; they stay in the statistics
    (SimpleTIR, arXiv 2509.02479, against collapse with tools). The reward function must name answers (`pred`)."""
    overlong: OverlongConfig = OverlongConfig()

    @property
    def num_workers(self) -> int:
        """`workers` with its default filled in."""
        return int(self.function != "math_dapo") if self.workers is None else self.workers

    @model_validator(mode="after")
    def _check_fields(self) -> RewardConfig:
        if self.placement == "ray" and not self.num_workers:
            raise ValueError("placement ray needs workers of at least 1: 0 scores in the controller process")
        if self.function == "math_verify" and not self.num_workers:
            raise ValueError(
                "function math_verify needs workers of at least 1: it may take for ever, and only they have a deadline"
            )
        if self.strict_box and self.function != "math_dapo":
            raise ValueError(f"strict_box is a form of function math_dapo, not of {self.function}; drop one of the two")
        return self


class RayConfig(Section):
    """The Ray cluster of servers and reward workers whose `placement` is `ray`."""

    address: str | None = None
    """Address of a running cluster. Start its nodes with RAY_AUTH_MODE=token and RAY_worker_niceness=0. null starts a cluster
    on this machine."""


class KLConfig(Section):
    """KL to the frozen starting policy. Off by default, as in the paper."""

    coef: float = Field(0.0, ge=0, le=1000)
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of single tokens, as in verl: k3 is cut at 10 nats, with its gradient (kernels/policy_loss/torch_path.py)."""
    place: Literal["loss", "reward"] = "loss"


class TISConfig(Section):
    """Correction of the engine's log-prob mismatch: weight min(exp(old_actor - rollout), cap), or its masked form, in which
    masked tokens still count in the loss's divisor (algo/correction.py)."""

    mode: Literal["off", "truncate", "mask"] = "off"
    cap: float = Field(2.0, gt=0)


class AlgoConfig(Section):
    """The objective. Defaults are the paper's."""

    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.28, ge=0)
    dual_clip: float | None = Field(None, gt=1)
    policy_loss: Literal["clip", "cispo", "gspo"] = "clip"
    """clip: PPO's and DAPO's, a ratio per token. cispo (arXiv 2506.13585): the clipped ratio only weighs a token's log-prob,
    so that clipped tokens keep a gradient; the paper clips above only, which is clip_low 1. gspo (arXiv 2507.18071): one
    ratio per response, exp(mean log-ratio of its tokens); set clip_low and clip_high to about 3e-4 and 4e-4. Wherever old
    log-probs were scored or come from the engine, gspo projects to the vocabulary once more."""
    loss_mode: LossMode = "token-mean"
    loss_length: int | None = Field(None, ge=1)
    """The constant of seq-mean-token-sum-norm, which divides by sequences · length, as verl does since 0.8 (before: by the length
    alone); None means rollout.max_response_tokens."""
    advantage: Literal["group", "gae"] = "group"
    """group: a response against the others to its prompt, one number for all its tokens (DAPO, GRPO). gae: generalised advantage
    estimation with a critic (PPO), a number per token, whitened over the rollout step's loss tokens; section `critic`."""
    gamma: float = Field(1.0, ge=0, le=1)
    """gae: the discount per token."""
    lam: float = Field(1.0, ge=0, le=1)
    """gae: λ. 1: the reward minus the value, the least biased. Lower: trust the critic's later values more."""
    advantage_std: Literal["unbiased", "biased", "none", "batch"] = "unbiased"
    """Of the group: with divisor n - 1 or n, or none. batch: that of all loss tokens of the rollout step, around their mean
    (REINFORCE++ with a group baseline, arXiv 2501.03262)."""
    advantage_baseline: Literal["mean", "leave-one-out"] = "mean"
    advantage_eps: float = Field(1e-6, ge=0, le=1)
    entropy_coef: float = Field(0.0, ge=0, le=10)
    old_logprobs: Literal["actor", "rollout"] = "actor"
    """actor: those of the policy before the rollout step. The first gradient step finds its own, so only the mini-batches after
    it cost a scoring pass (all of them with kl.place=reward, or where several epochs replay routes). rollout: those of the engine."""
    max_mismatch: float | None = Field(None, gt=0)
    """A larger mean |log-prob of actor - of rollout engine| of a step's loss tokens, in nats, ends the run before it trains
    on them: before the optimizer's first step. With old_logprobs=rollout the actor then scores the mini-batches after the
    first. With and without a limit, a mean above 0.1 at the first step after a start gives a warning."""
    kl: KLConfig = KLConfig()
    tis: TISConfig = TISConfig()

    @property
    def penalises_rewards(self) -> bool:
        """True if the KL penalty is in the reward."""
        return self.kl.coef > 0 and self.kl.place == "reward"

    @property
    def reads_policy_logprobs(self) -> bool:
        """True if gradient steps read log-probs of the policy before the rollout step."""
        return self.old_logprobs == "actor" or self.tis.mode != "off" or self.max_mismatch is not None


class BatchConfig(Section):
    """How a rollout step's groups become gradient steps and micro-batches."""

    mini_batch_prompts: Count = 32
    """Groups per gradient step; train_batch_prompts / mini_batch_prompts gradient steps per rollout step."""
    max_tokens: Tokens = 22528
    """Token budget of one micro-batch on one context-parallel rank."""
    packing: bool = True
    """False: right-padded rectangles instead of packed (THD) sequences."""
    epochs: int = Field(1, ge=1, le=1000)
    shuffle: bool = True
    feeder: Literal["plain", "dali"] = "plain"
    """How micro-batches get to the GPU, two ahead of their use, bit for bit the same. plain: one copy each from pinned memory, on a
    stream of its own. dali: NVIDIA DALI's external source (extra `dali`, 0.6 GB). Use plain: micro-batches come packed, so DALI
    has nothing to do but copy them, and takes 2 to 10 times the host's time (1 to 2 ms each against 0.2 to 0.4, on a CPU)."""
    head_chunk_tokens: Tokens = 1024
    """Rows of the policy head projected to the vocabulary at a time."""
    head_eager_grad: bool = True
    """Add the output matrix's gradient to Megatron's fp32 main_grad in the forward pass: saves a copy of that matrix and,
    in bf16, a rounding. False keeps it until the backward pass."""


class EvalConfig(Section):
    """mean@k on held-out prompts, by the training rollout path."""

    sets: dict[Name, DataConfig] = Field(default_factory=dict)
    every: Steps = 5
    at_start: bool = True
    samples_per_prompt: Count = 8
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: Seed = 777


class CheckpointConfig(Section):
    """Saving, resuming and exporting. Steps are rollout steps."""

    every: int | None = Field(None, ge=1)
    """Save every this many rollout steps. null: only as `at_end` says."""
    at_end: bool = True
    """Save after the last step, and when a signal ends the run. False with `every` null never saves."""
    keep: int = Field(2, ge=1)
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
    export_at_end: bool = True

    @model_validator(mode="after")
    def _check_fields(self) -> CheckpointConfig:
        if self.async_save and self.every is None:
            raise ValueError(
                "async_save is for the checkpoints of every, which is null: set every, or async_save false (the last checkpoint "
                "is always waited for)"
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
    wandb_project: str | None = Field(None, min_length=1, max_length=128)
    samples_per_step: int = Field(4, ge=0, le=1_000_000)
    plot_at_end: bool = True
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


class WarmStartConfig(Section):
    """Supervised steps on demonstrations, through the same actor, before the first rollout step."""

    files: FilePaths
    """JSONL with `prompt` and `response`. A response with tools is a list of texts, in turn the policy's and a tool's with all that
    stands around it, as the policy reads it: ["<tool_call>…</tool_call>", "<tool_response>8</tool_response>", "Answer: 8"]. Only the
    policy's texts are trained on."""
    batch_size: Count = 128
    max_updates: Steps = 300
    lr: LearningRate = 3e-3
    warmup_updates: int = Field(20, ge=0, le=1_000_000_000)
    weight_decay: float = Field(0.01, ge=0, le=10)
    stop_at: float | None = Field(None, gt=0, le=1)
    """Stop once this pass rate is reached on `choose` (measured every `check_every` updates)."""
    check_every: Steps = 10
    choose: DataConfig | None = None
