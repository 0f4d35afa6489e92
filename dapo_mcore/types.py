"""The records that cross stage borders, and the protocols of replaceable stages.

Change here: what one stage tells the next. Token data is flat numpy, never a Python list per token.
Letters of shapes everywhere: P prompts, G group size, B samples, T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, rendered to tokens.

    uid        names the prompt by its content (data/identity.py), unique in its set: a group finds its prompt again by it
               after a restart, also where rows have moved.
    token_ids  int32 [T], what the engine is given: `[1, 50, 12]`.
    text       the same, as a person reads it.
    answer     ground truth handed to the reward function.
    source     name of the data set, for reward functions that dispatch on it.
    extra      the row's columns without the prompt; the answer column holds `answer`.
    messages   the prompt as the row has it where that is a chat, [{role, content}, …]; else None.
    row        where it was read, for people: `train.jsonl row 18`.
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
    """The sampling law of one call. `seed` makes a call repeatable; temperature 0 is greedy (evaluation only)."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One generated response.

    token_ids       int32 [T], response only, with the end-of-sequence token when there is one.
    logprobs        float32 [T], natural log of the probability of each token after temperature (not renormalised for
                    top_p and top_k), as the engine computed it; 0 where loss_mask is False.
    loss_mask       bool [T]; False on tokens the policy did not write (tool output).
    finish_reason   `stop`, `length` (truncated) or `abort`.
    weight_version  version of the weights that produced every token; the oldest, when several did.
    version_spans   empty when one version produced all tokens; else (first token, version) of each stretch, in order:
                    ((0, 3), (17, 4)) says that version 4 took over at token 17.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    loss_mask: np.ndarray
    finish_reason: FinishReason
    weight_version: int
    version_spans: tuple[tuple[int, int], ...] = ()

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Score:
    """The outcome of scoring one response.

    reward    what the advantage is computed from: score + penalty.
    score     raw reward of the answer, for instance +1 or -1.
    penalty   soft overlong punishment, 0 or negative.
    acc       raw correctness, the metric of dynamic sampling; never contains the penalty.
    pred      what was extracted from the response, for people to read.
    failure   None, or why there is no score (`timeout`, `exception: …`, `nan`); then `acc` is False, and the sample is
              out of statistics and loss unless the configuration gives failures a value.
    masked    True when the sample must leave group statistics and loss because scoring failed.
    """

    reward: float
    score: float
    acc: bool
    pred: str = ""
    penalty: float = 0.0
    failure: str | None = None
    masked: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """A response with its text and score."""

    rollout: Rollout
    text: str
    score: Score

    @property
    def scored(self) -> bool:
        """True when the sample counts: scoring did not fail, and generation was not aborted."""
        return not self.score.masked and self.rollout.finish_reason != "abort"


@dataclass(frozen=True, slots=True)
class Group:
    """All responses to one prompt. Example: G = 2, accuracies (True, False): it varies, so it can teach."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    @property
    def weight_version(self) -> int:
        """The oldest version among the samples."""
        return min(sample.rollout.weight_version for sample in self.samples)


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One rollout step's samples as flat arrays (host memory), prompt and response back to back.

    tokens            int32 [T]   all samples concatenated; sample b is tokens[offsets[b]:offsets[b + 1]].
    loss_mask         bool  [T]   True on tokens whose log-prob is trained; always False on prompts.
    rollout_logprobs  float32 [T] the engine's log-probs, 0 where loss_mask is False.
    offsets           int64 [B+1]
    rewards           float64 [B]
    group_ids         int64 [B]   equal numbers are one group; groups are contiguous.
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
        """int64 [B], tokens of prompt and response."""
        return np.diff(self.offsets)

    @property
    def num_loss_tokens(self) -> np.ndarray:
        """int64 [B], tokens of each sample that are trained."""
        return np.add.reduceat(self.loss_mask, self.offsets[:-1], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass of one context-parallel rank reads.

    tokens, position_ids   int64 [b, s]; packed (THD): b = 1 and s = this rank's share of the pack.
    cu_seqlens             int32 [n+1], boundaries of the whole padded sequences before the context-parallel split; None
                           when not packed.
    max_seqlen             longest padded sequence, in tokens.
    rows                   int64 [L], the positions that predict a loss token, indexing hidden states [s, b, H] flattened
                           to [s·b, H].
    targets                int64 [L], the token each row predicts.
    advantages             float32 [L]
    token_weights          float32 [L], see algo/loss.py; the loss is the weighted sum over rows.
    rollout_logprobs       float32 [L]
    sample_ids             int64 [L], which sample of the TrainBatch a row belongs to.
    old_logprobs, ref_logprobs  float32 [L] or None until scored.
    All row tensors hold this context-parallel rank's rows only.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    rows: torch.Tensor
    targets: torch.Tensor
    advantages: torch.Tensor
    token_weights: torch.Tensor
    rollout_logprobs: torch.Tensor
    sample_ids: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None

    def with_(self, **changes: Any) -> MicroBatch:
        """A copy with some fields replaced."""
        return replace(self, **changes)


class RolloutEngine(Protocol):
    """Generates responses with versioned weights. Lives on rank 0."""

    @property
    def weight_version(self) -> int: ...

    def generate(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[Rollout]:
        """One response for each entry of `prompts` (int32 [T] each; repeat a prompt to sample it again), in order."""
        ...

    def update_weights(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        """Takes every HF-named tensor of the stream, then moves to `version`; after an error it generates nothing until a
        whole stream came.

        The stream is drained in any case, since other ranks send what is in it. Its tensors keep their values meanwhile.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """`rollout/…` and `sync/…` metrics since the last call; see observe/metrics.py."""
        ...

    def close(self) -> None:
        """Ends what the engine has started. May be called twice."""
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
"""Makes a tensor as torch.empty does: called with a shape, `dtype` and `device`."""


@runtime_checkable
class ReceivingEngine(RolloutEngine, Protocol):
    """An engine that says where a tensor is best gathered: it may send a large one on from there without a copy."""

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for one tensor of the next `update_weights`, as torch.empty. A tensor may also lie elsewhere."""
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
    """Scores samples in order; one failure never takes another sample down."""

    def __call__(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[str]) -> list[Score]: ...
