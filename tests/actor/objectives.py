"""Every objective in its plainest form: fp64, sample by sample, over whole logits of Hugging Face's model. The reference of
test_invariance.py. It reads no engine log-prob of a token without loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dapo_mcore.config.schema import Config
from dapo_mcore.types import TrainBatch
from tests.actor import parity


def first_gradient(batch: TrainBatch, config: Config) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return gradient and metrics of the first gradient step. Every sample must be in the statistics."""
    model, reference = parity.model64("qwen2", False), parity.model64("qwen2", False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.01)  # as test_invariance.py does
    everyone = _step(batch, config, model, reference)
    first = np.isin(batch.group_ids, np.unique(batch.group_ids)[: config.batch.mini_batch_prompts])
    advantages = _advantages(batch, config, model, reference)
    chosen = [sample for sample in np.flatnonzero(first) if batch.num_loss_tokens[sample]]
    tokens = [_Sample(batch, sample, config, model, reference) for sample in chosen]
    for one in tokens:
        one.norm = _norm_factor(everyone)
    selected = _selected(tokens, advantages[chosen], config)
    losses = [one.losses(advantages[sample], picked) for one, sample, picked in zip(tokens, chosen, selected)]
    sums = torch.stack([loss[one.kept()].sum() for loss, one in zip(losses, tokens)])
    counts = [
        len(loss) if config.algo.rejection_divisor == "all" else int(one.kept().sum())
        for loss, one in zip(losses, tokens)
    ]
    sums, lengths = sums[[n > 0 for n in counts]], torch.tensor([n for n in counts if n])
    mode = config.algo.loss_mode
    if mode == "token-mean":
        total = sums.sum() / lengths.sum()
    elif mode == "seq-mean-token-mean":
        total = (sums / lengths).mean()
    else:
        assert mode == "seq-mean-token-sum-norm"
        total = sums.mean() / config.rollout.max_response_tokens
    total.backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    means = {name: float(torch.cat([one.metrics[name] for one in tokens]).mean()) for name in tokens[0].metrics}
    if config.algo.rejection:
        kept = [one.kept() for one in everyone]
        means["rejection/tokens"] = 1 - float(torch.cat(kept).double().mean())
        means["rejection/responses"] = sum(not one.any() for one in kept) / len(kept)
    return gradient, {"actor/loss": total.item()} | means


class _Sample:
    """The loss tokens of one sample, [n] each."""

    def __init__(self, batch: TrainBatch, sample: int, config: Config, model: Any, reference: Any):
        where = slice(batch.offsets[sample], batch.offsets[sample + 1])
        mask = torch.from_numpy(batch.loss_mask[where])[1:]
        tokens = torch.from_numpy(batch.tokens[where].astype(np.int64))
        self.config, self.metrics, self.norm, self.sample = config, {}, 1.0, int(sample)
        self.places = [int(sample) * 2**24 + int(at) for at in mask.nonzero()[:, 0]]
        self.engine = torch.from_numpy(batch.rollout_logprobs[where].astype(np.float64))[1:][mask]
        self.logp, self.entropy = _logprobs(model, tokens, mask)
        with torch.no_grad():
            self.reference, _ = _logprobs(reference, tokens, mask)
        self.own = self.logp.detach()

    def kl(self, logp: Tensor) -> Tensor:
        x = logp - self.reference
        return {"k1": x, "k3": (-x).exp() - 1 + x}[self.config.algo.kl.estimator]

    def losses(self, advantage: Tensor, selected: Tensor) -> Tensor:
        """Return the tokens' losses, and fill in their metrics. selected  bool [n], by covariance."""
        algo = self.config.algo
        old = self.old()
        loss = self._policy_term(advantage, old)
        if algo.policy_loss == "kl_cov":
            loss = -advantage * (self.logp - old).exp()
            loss = torch.where(selected, loss + algo.kl_cov.coef * (self.logp - old).abs(), loss)
        if algo.policy_loss == "clip_cov":
            loss = loss * ~selected
        loss = loss * self._importance() / self.norm
        if algo.kl.coef and algo.kl.place == "loss":
            loss = loss + algo.kl.coef * self.kl(self.logp)
        self.metrics |= {
            "actor/nll": -self.own,
            "actor/entropy": self.entropy.detach(),
            "actor/ppo_kl": old - self.own,
            "mismatch/logprob_diff_mean": (self.own - self.engine).abs(),
            "mismatch/k3_kl": (self.own - self.engine).expm1() - (self.own - self.engine),
        }
        if algo.kl.coef:
            self.metrics["actor/ref_kl"] = self.kl(self.own)
        return loss - algo.entropy_coef * self.entropy

    def _policy_term(self, advantage: Tensor, old: Tensor) -> Tensor:
        algo, log_ratio = self.config.algo, self.logp - old
        low, high = 1 - algo.clip_low, 1 + algo.clip_high
        if algo.policy_loss == "cispo":
            return -log_ratio.exp().clamp(low, high).detach() * advantage * self.logp
        ratio = log_ratio.exp()
        if algo.policy_loss == "gspo":
            ratio = log_ratio[self.kept()].mean().exp().expand(len(old))  # the gradient goes through the mean
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
        capped = algo.dual_clip and advantage < 0
        return torch.minimum(loss, -advantage * algo.dual_clip) if capped else loss

    def old(self) -> Tensor:
        return self.engine if self.config.algo.old_logprobs == "rollout" else self.own

    def kept(self) -> Tensor:
        """Return bool [n], the tokens that every criterion of rejection keeps."""
        kept, r = torch.ones(len(self.own), dtype=torch.bool), (self.own - self.engine).exp()
        for rule in self.config.algo.rejection:
            value = {"ratio": r, "k2": r.log() ** 2 / 2, "k3": r - 1 - r.log()}[rule.measure]
            if rule.level == "sequence":
                value = value.prod() if rule.measure == "ratio" else value.sum()
            elif rule.level == "geometric":
                value = value.log().mean().exp() if rule.measure == "ratio" else value.mean()
            inside = (value >= (rule.lower or 0)) & (value <= (rule.upper or 1e9))
            kept &= inside.all() if rule.level == "every" else inside
        return kept

    def _importance(self) -> Tensor:
        tis, weights = self.config.algo.tis, (self.own - self.engine).exp()
        if tis.level != "token":
            weights = weights.prod() if tis.level == "sequence" else weights.log().mean().exp()
            weights = weights.expand(len(self.own))
        if tis.mode == "off":
            return torch.ones(())
        low, high = tis.lower, tis.cap or 1e9
        if low is None:
            low = 0 if tis.mode == "truncate" else 1 / tis.cap
        limited = (weights < low) | (weights > high)
        if tis.mode == "truncate":
            kept = torch.where(weights > high, high, torch.where(weights < low, low, weights))
        else:
            kept = torch.where(limited, 0.0, weights if tis.mode == "icepop" else 1.0)
        self.metrics |= {
            "tis/weight_mean_before": weights,
            "tis/weight_mean_after": kept,
            "tis/truncated_ratio": limited.double(),
        }
        return kept


def _step(batch: TrainBatch, config: Config, model: Any, reference: Any) -> list[_Sample]:
    """Return the step's samples with loss tokens."""
    with torch.no_grad():
        found = [_Sample(batch, b, config, model, reference) for b in np.flatnonzero(batch.num_loss_tokens)]
    return found


def _norm_factor(everyone: list[_Sample]) -> float:
    """Return the mean of the step's limited weights, over tokens or over responses."""
    tis = everyone[0].config.algo.tis
    if not tis.normalize:
        return 1.0
    weights = [one._importance() for one in everyone]
    each = torch.cat(weights) if tis.level == "token" else torch.stack([own[0] for own in weights])
    return float(each.mean())


def _selected(tokens: list[_Sample], advantages: Tensor, config: Config) -> list[Tensor]:
    """Return the tokens of a mini-batch that KL-Cov or Clip-Cov chooses."""
    algo, kept = config.algo, torch.cat([one.kept() for one in tokens])
    chosen = torch.zeros(len(kept), dtype=torch.bool)
    if algo.selects_by_covariance:
        logp = torch.cat([one.own for one in tokens])
        each = advantages.repeat_interleave(torch.tensor([len(one.own) for one in tokens]))
        covariance = (logp - logp[kept].mean()) * (each - each[kept].mean())
        if algo.policy_loss == "kl_cov":
            ranked = sorted(kept.nonzero()[:, 0].tolist(), key=lambda at: -covariance[at])
            ratio = algo.kl_cov.ratio
        else:
            ratio, r = algo.clip_cov.ratio, (logp - torch.cat([one.old() for one in tokens])).exp()
            clipped = torch.where(each < 0, r < 1 - algo.clip_low, r > 1 + algo.clip_high)
            may = kept & ~clipped & (covariance > algo.clip_cov.lower) & (covariance < algo.clip_cov.upper)
            places = [place for one in tokens for place in one.places]
            ranked = sorted(may.nonzero()[:, 0].tolist(), key=lambda at: -_split_mix(places[at]))
            assert len(ranked) > int(ratio * int(kept.sum())) > 1, "a draw that leaves some out"
        chosen[ranked[: max(1, int(ratio * int(kept.sum())))]] = True
    return list(chosen.split([len(one.own) for one in tokens]))


def _split_mix(state: int) -> int:
    """Return SplitMix64's first number."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> shift)) * factor % 2**64
    return z ^ (z >> 31)


def _logprobs(model: Any, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    logp = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    return logp.gather(1, tokens[1:, None])[:, 0][mask], -(logp.exp() * logp).sum(-1)[mask]


def _advantages(batch: TrainBatch, config: Config, model: Any, reference: Any) -> Tensor:
    """Return the advantages of all samples of the step, [B]."""
    algo, rewards = config.algo, torch.from_numpy(batch.rewards)
    if algo.kl.coef and algo.kl.place == "reward":
        with torch.no_grad():
            samples = [_Sample(batch, sample, config, model, reference) for sample in range(batch.num_samples)]
        rewards = rewards - algo.kl.coef * torch.stack([one.kl(one.own).sum() for one in samples])
    found = torch.zeros_like(rewards)
    for group in np.unique(batch.group_ids):
        own = torch.from_numpy(batch.group_ids == group)
        spread = rewards[own].std() + 1e-6 if algo.advantage_std == "unbiased" else 1.0
        found[own] = (rewards[own] - rewards[own].mean()) / spread
    if algo.advantage_std == "batch":
        everyone = {one.sample: one for one in _step(batch, config, model, reference)}
        counts = [int(everyone[b].kept().sum()) if b in everyone else 0 for b in range(batch.num_samples)]
        each = found.repeat_interleave(torch.tensor(counts))
        found = (found - each.mean()) / (each.var() + 1e-8).sqrt()
    return found
