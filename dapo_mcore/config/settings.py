"""The sections of a run's configuration in one record, without the rules between them: those are rules.py.

Change here: a new section, or a quantity that follows from several sections.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from dapo_mcore.config.agent import AgentConfig
from dapo_mcore.config.algo import AlgoConfig
from dapo_mcore.config.critic import CriticConfig
from dapo_mcore.config.data import DataConfig, EvalConfig, WarmStartConfig
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.config.parallel import ParallelConfig
from dapo_mcore.config.reward import RewardConfig
from dapo_mcore.config.sections import (
    BatchConfig,
    CheckpointConfig,
    ObserveConfig,
    RayConfig,
    RolloutConfig,
    SamplingConfig,
)
from dapo_mcore.config.tools import ToolConfig
from dapo_mcore.config.values import Count, FilePath, Name, Section, Seed, Steps, TwoUnits


class Settings(Section):
    """One training run, each section checked on its own."""

    two_units: ClassVar[tuple[TwoUnits, ...]] = (TwoUnits("num_rollout_steps", "num_epochs", default=100),)

    name: Name = "run"
    """The run's folder is output_dir/name."""
    output_dir: FilePath = "runs"
    """Folder of runs, relative to where the run starts."""
    seed: Seed = 0
    """Of weights without a loaded model, the order of prompts and the drawing of responses."""
    deterministic: bool = False
    """Use only kernels whose sums have a fixed order, so that a run on GPUs repeats bit by bit with the same GPUs, versions and
    layout; runs on CPUs do so without it. Costs speed: attention's backward pass has slower kernels, and NCCL only rings.
    SGLang servers on GPUs that the run starts get enable-deterministic-inference; servers at `urls` must have it already.
    An operation without such a kernel ends the run. Changes roundings on CPUs, too. Not yet run on a GPU."""
    num_rollout_steps: Steps | None = None
    """Length of the run. null: as `num_epochs` says, or 100."""
    num_epochs: Count | None = None
    """Length of the run in passes over `data`: every prompt is generated for once per epoch, whatever is filtered out. The last rollout
    step trains on the groups that are left, also if they are fewer than train_batch_prompts. Set one of the two."""
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig = RolloutConfig()
    agent: AgentConfig = AgentConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    tools: list[ToolConfig] = Field(default_factory=list)
    """What the policy may call while it writes a response; `dapo-mcore tool` makes a single call."""
    ray: RayConfig = RayConfig()
    algo: AlgoConfig = AlgoConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    warm_start: WarmStartConfig | None = None
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Extra fields of megatron.core.transformer.TransformerConfig."""

    @property
    def run_dir(self) -> Path:
        """Folder that holds everything this run writes."""
        return Path(self.output_dir) / self.name

    @property
    def updates_per_step(self) -> int:
        """Gradient steps of a full rollout step. Needs batch.mini_batch_prompts, which units.py fills in."""
        return self.sampling.train_batch_prompts // self.batch.mini_batch_prompts * self.batch.epochs

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def longest_generation(self) -> tuple[str, int]:
        """The keys that limit the longest sequence that an engine meets, in training or in an evaluation, and its tokens."""
        response = "rollout.max_response_tokens", self.rollout.max_response_tokens
        found = [("data", self.data, response)]
        found += [(f"eval.sets.{name}", own, self.eval_response_limit(name)) for name, own in self.eval.sets.items()]
        if self.warm_start is not None and self.warm_start.choose is not None:
            found.append(("warm_start.choose", self.warm_start.choose, response))
        limits = [
            (f"{section}.max_prompt_tokens + {key}", own.max_prompt_tokens + most)
            for section, own, (key, most) in found
        ]
        return max(limits, key=lambda limit: limit[1])  # training's, where others are as long

    @property
    def set_functions(self) -> dict[str, str]:
        """The reward functions of evaluation sets that have another one than `reward`, or other kwargs, by the set's name."""
        own = {name: section.reward_function for name, section in self.eval.sets.items() if section.reward_function}
        return {
            name: function
            for name, function in own.items()
            if function != self.reward.function or self.eval.sets[name].reward_kwargs
        }

    def set_reward(self, name: str) -> RewardConfig:
        """Return the section `reward` as an evaluation set of set_functions uses it. Raise ValidationError as RewardConfig does."""
        return self.reward.for_function(self.set_functions[name], self.eval.sets[name].reward_kwargs)

    def eval_response_limit(self, name: str) -> tuple[str, int]:
        """Return the key that limits the responses of the evaluation set `name`, and the tokens."""
        for key, section in ((f"eval.sets.{name}", self.eval.sets[name]), ("eval", self.eval)):
            if section.max_response_tokens is not None:
                return f"{key}.max_response_tokens", section.max_response_tokens
        return "rollout.max_response_tokens", self.rollout.max_response_tokens

    def num_unscored(self, num_mini_batches: int) -> int:
        """Return how many mini-batches of a rollout step, from the first on, need no scoring pass.

        The first gradient step has the weights that would score, so its old log-probs are those of its own forward pass, and
        further epochs take them from there. A KL in the reward needs those of whole samples before that step, and further epochs
        of a model that replays routes need the routes of scoring. A correction that depends on other tokens needs those of all.
        """
        if (
            self.algo.penalises_rewards
            or self.algo.corrects_before
            or (self.model.routing_replay == "scoring" and self.batch.epochs > 1)
        ):
            return 0
        return 1 if self.algo.reads_policy_logprobs else num_mini_batches
