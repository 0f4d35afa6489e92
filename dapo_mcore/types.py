"""The records that cross stage borders, and the protocols of replaceable stages.

Change here: the fields that one stage hands to the next. Token data is flat numpy, never a Python list per token.
Letters in shapes, everywhere: P prompts, G group size, B samples, T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

FinishReason = Literal["stop", "length", "abort"]
CallKind = Literal["ok", "error", "timeout", "infrastructure"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, rendered to tokens.

    uid        identifies the prompt by its content (data/identity.py), unique in its set: after a restart a group finds its
               prompt by the uid, even if rows have moved.
    token_ids  int32 [T], the input of the engine: `[1, 50, 12]`.
    text       the same prompt as text, for people.
    answer     ground truth for the reward function.
    source     name of the data set, for reward functions that dispatch on it.
    extra      the row's columns without the prompt; the answer column holds `answer`.
    messages   the chat of the row, [{role, content}, …], or None for a plain-text prompt.
    row        file and row, for messages: `train.jsonl row 18`.
    """

    uid: str
    token_ids: np.ndarray
    text: str
    answer: str
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Mapping[str, Any]] | None = None
    row: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one call samples. `seed` makes the call repeatable; temperature 0 is greedy (evaluation only)."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool in a response.

    name, arguments  as the policy wrote them; the name is empty if the call cannot be read.
    kind             `ok`; `error` of the policy, such as a call that cannot be read, an unknown tool or code that fails;
                     `timeout`; or `infrastructure`: the tool failed through no fault of the policy.
    output           the text that the policy read of it, before agent.max_output_tokens shortened it.
    seconds          while the tool ran.
    """

    name: str
    arguments: str
    kind: CallKind
    output: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Rollout:
    """One generated response. With tools it is a number of turns of the policy, with the tools' output between them.

    token_ids       int32 [T], response only, with the end-of-sequence token when there is one.
    logprobs        float32 [T], natural log of the probability of each token after temperature (not renormalised for
                    top_p and top_k), as the engine computed it; 0 where loss_mask is False.
    loss_mask       bool [T]; False on tokens the policy did not write (tool output).
    finish_reason   `stop`, `length` (truncated) or `abort`.
    weight_version  version of the weights that produced the tokens; the oldest if there were several.
    version_spans   empty if one version produced all tokens; else (first token, version) of each span, in order:
                    ((0, 3), (17, 4)) says that version 4 produced the tokens from 17 on.
    seed            of the request; None if the engine does not tell.
    num_turns       turns that the policy wrote.
    calls           of tools, in order.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    loss_mask: np.ndarray
    finish_reason: FinishReason
    weight_version: int
    version_spans: tuple[tuple[int, int], ...] = ()
    seed: int | None = None
    num_turns: int = 1
    calls: tuple[ToolCall, ...] = ()

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def num_policy_tokens(self) -> int:
        """Number of tokens that the policy wrote."""
        return int(np.count_nonzero(self.loss_mask))


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one response.

    reward    score + penalty; the advantage is computed from it.
    score     raw reward of the answer, for instance +1 or -1.
    penalty   soft overlong punishment, 0 or negative.
    acc       raw correctness in [0, 1], which dynamic sampling and evaluations look at; never contains the penalty. It is the `acc`
              of the reward function, else its score, held between 0 and 1.
    pred      the answer that was extracted from the response, for people; one of NO_ANSWER if none was found.
    failure   None, or why there is no score (`timeout`, `exception: …`, `nan`; `log-probs: …` if the engine's are not finite;
              `tool: …` if a tool failed through no fault of the policy).
              Then `acc` is 0, and statistics and loss leave the sample out unless the configuration gives failures a value.
    masked    True if group statistics and loss leave the sample out because scoring failed.
    """

    reward: float
    score: float
    acc: float
    pred: str = ""
    penalty: float = 0.0
    failure: str | None = None
    masked: bool = False

    @property
    def right(self) -> bool:
        """True from half of the full correctness on: a small bonus for the form alone is not right."""
        return self.acc >= 0.5

    @property
    def answered(self) -> bool:
        """True unless scoring succeeded without finding an answer."""
        return self.failure is not None or self.pred not in NO_ANSWER


NO_ANSWER = ("", "[INVALID]")
"""`Score.pred` of a response without an answer. math_dapo, verl's and ours, gives the second."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A response with its score, and its text for people: with tools, also what they gave."""

    rollout: Rollout
    text: str
    score: Score

    @property
    def scored(self) -> bool:
        """True if the sample counts: scoring did not fail, and generation was not aborted."""
        return not self.score.masked and self.rollout.finish_reason != "abort"

    @property
    def void(self) -> bool:
        """True if there is nothing to learn from: no token of the policy, or neither an answer nor a right outcome."""
        return not self.rollout.loss_mask.any() or not (self.score.right or self.score.answered)


@dataclass(frozen=True, slots=True)
class Group:
    """All responses to one prompt. Example: with G = 2 and accuracies (1.0, 0.0) the group varies, so it is trained on."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    @property
    def weight_version(self) -> int:
        """The oldest version among the samples."""
        return min(sample.rollout.weight_version for sample in self.samples)


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """The samples of one rollout step as flat arrays in host memory. Each sample is its prompt followed by its response.

    tokens            int32 [T]   all samples concatenated; sample b is tokens[offsets[b]:offsets[b + 1]].
    loss_mask         bool  [T]   True on loss tokens; always False on prompts.
    rollout_logprobs  float32 [T] the engine's log-probs, 0 where loss_mask is False.
    offsets           int64 [B+1]
    rewards           float64 [B]
    group_ids         int64 [B]   samples of one group have the same number and are contiguous.
    in_statistics     bool [B]    False for a sample whose scoring failed.
    Example: two samples of lengths 5 and 3 have offsets [0, 5, 8].
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    rollout_logprobs: np.ndarray
    offsets: np.ndarray
    rewards: np.ndarray
    group_ids: np.ndarray
    in_statistics: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B], number of prompt and response tokens."""
        return np.diff(self.offsets)

    @property
    def num_loss_tokens(self) -> np.ndarray:
        """int64 [B], number of loss tokens of each sample."""
        return np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one forward pass on one context-parallel rank.

    tokens, position_ids   int64 [b, s]; packed (THD): b = 1 and s = this rank's share of the pack.
    cu_seqlens             int32 [n+1], boundaries of the whole padded sequences before the context-parallel split; None
                           if not packed.
    lengths                int64 [n], numpy: the padded length of each of these sequences. On the host, so that planning with
                           them never waits for the device.
    rows                   int64 [L], positions that predict a loss token: indices into the hidden states [s, b, H], flattened
                           to [s·b, H].
    targets                int64 [L], the token that each row predicts.
    advantages             float32 [L]
    token_weights          float32 [L], see algo/loss.py; the loss is the weighted sum over rows.
    rollout_logprobs       float32 [L]
    sample_ids             int64 [L], the sample of the TrainBatch that each row belongs to.
    old_logprobs   float32 [L], the policy's before the rollout step's first update; None if not scored: then the update that
                   reads them must be the first, whose own log-probs they are.
    ref_logprobs   float32 [L], the reference policy's; None without one.
    sequence_ids     int64 [b, s], the number of each token's sample in the micro-batch, n for padding; None if experts have no
                     load-balancing loss.
    balance_weights  float32 [n], see algo/loss.py; of each of these samples.
    values   float32 [L], the critic's before the rollout step's first update; None without a critic.
    returns  float32 [L], what the critic learns; None without one.
    row_sequences    int64 [L], the number of each row's sample in the micro-batch; None unless a ratio is per sequence.
    tis_weights    float32 [L], see algo/correction.py; None: without a correction, or found in the gradient step.
    policy_mask    float32 [L], 0 for tokens without a policy term (Clip-Cov); None: every token has one.
    old_kl_coefs   float32 [L], of |log-prob - old log-prob| (KL-Cov); None without it.
    routes   the experts of each token by Megatron's layer number, [tokens of this rank, experts per token], for routers to fill
             in a scoring pass and to replay in gradient steps; None if every pass has routes of its own.
    Row tensors hold the rows of this context-parallel rank only.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None
    lengths: np.ndarray
    rows: torch.Tensor
    targets: torch.Tensor
    advantages: torch.Tensor
    token_weights: torch.Tensor
    rollout_logprobs: torch.Tensor
    sample_ids: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    sequence_ids: torch.Tensor | None = None
    balance_weights: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    row_sequences: torch.Tensor | None = None
    tis_weights: torch.Tensor | None = None
    policy_mask: torch.Tensor | None = None
    old_kl_coefs: torch.Tensor | None = None
    routes: dict[int, torch.Tensor] | None = None

    @property
    def max_seqlen(self) -> int:
        """The longest padded sequence, in tokens."""
        return int(self.lengths.max())

    def with_(self, **changes: Any) -> MicroBatch:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)


class RolloutEngine(Protocol):
    """Generates responses with weights that have a version. Exists on rank 0 only."""

    @property
    def weight_version(self) -> int: ...

    def generate(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Rollout]:
        """Return one response for each entry of `prompts` (int32 [T] each), in order. Repeat a prompt to sample it again."""
        ...

    def update_weights(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Load every HF-named tensor of the stream as weight version `version`. After an error, generate nothing until a whole
        stream has been loaded.

        Drain the stream in any case, because other ranks send it. Its tensors keep their values meanwhile.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return the `rollout/…` and `sync/…` metrics since the last call; see observe/metrics.py."""
        ...

    def close(self) -> None:
        """Stop everything that the engine has started. May be called twice."""
        ...


@runtime_checkable
class ContinuousEngine(RolloutEngine, Protocol):
    """An engine whose requests come and go independently, so that a finished one can be replaced at once.

    Its servers may lose the weights. Requests then wait for the next `update_weights`, and fail with RolloutError if none
    comes in time.
    """

    def submit(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> Future[list[Rollout]]:
        """Start what `generate` does and return its future. Cancelling the future aborts its requests.

        Do not update weights before every future is done, unless the engine continues requests under new weights
        (sampling.on_full keep), or `weights_lost`: the requests that wait then are made by the new weights.
        """
        ...

    @property
    def weights_lost(self) -> bool:
        """True if no server has the weights any more, but another `update_weights` can give them to some."""
        ...

    def cancel_requests(self) -> None:
        """Cancel all requests and take no new ones: whoever waits for one gets CancelledError."""
        ...


Empty = Callable[..., torch.Tensor]
"""Creates a tensor as torch.empty does, from a shape, `dtype` and `device`."""


@runtime_checkable
class ReceivingEngine(RolloutEngine, Protocol):
    """An engine that provides the memory in which a tensor is gathered, so that it can pass on a large one without a copy."""

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return memory for one tensor of the next `update_weights`, as torch.empty does. Its use is optional."""
        ...


@runtime_checkable
class LeadingEngine(RolloutEngine, Protocol):
    """An engine whose `update_weights` may ask other ranks for more than their shards. Their part is a SyncPeer."""

    def dismiss_peers(self) -> None:
        """Let every peer return from `serve`. Called after each `update_weights`, also after one that failed."""
        ...


class SyncPeer(Protocol):
    """The part in a weight sync of a rank other than 0, for instance to hand the weights to servers of its own node.

    It does what rank 0's engine asks for during `update_weights`. How the engine asks is theirs.
    """

    def serve(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take part in one `update_weights`, and return once rank 0 has called `dismiss_peers` for it.

        weights  what the weight stream yields on this rank: nothing, unless the stream gathers tensors here too. Drain it in
                 any case, without waiting for rank 0 meanwhile: rank 0 waits for the messages that are sent by it.
        Tell rank 0 of an error, so that its update fails. An error that is raised ends the job.
        """
        ...


class ColocatedEngine(RolloutEngine, Protocol):
    """An engine on the actor's devices. Both take turns.

    release → (training) → update_weights, which takes memory for the weights only → resume → generate.
    """

    def release(self) -> None:
        """Release all device memory, weights included. Nothing can be generated until `resume`."""
        ...

    def resume(self) -> None:
        """Take the rest of the memory, after `update_weights`, and generate."""
        ...


class RewardFunction(Protocol):
    """Scores samples in order. The failure of one sample never affects another.

    turns  the texts of each sample's turns, as the policy wrote them. Without tools there is one, the whole response.
    """

    def __call__(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], turns: Sequence[Sequence[str]]
    ) -> list[Score]: ...
