"""Three gradient steps of a small policy: on a mesh of real gloo processes, and in plain fp64 (Hugging Face + AdamW).

Helpers of the tests beside this file; the worker functions run in spawned processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from dapo_mcore.config.file import parse_config
from dapo_mcore.config.schema import Config
from dapo_mcore.types import TrainBatch

VOCAB, LAYERS, STEPS, LR = 61, 4, 3, 1e-3


@dataclass(frozen=True)
class Mesh:
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    expert: int = 1
    expert_tensor: int | None = None
    virtual: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        chunks = f"VPP{self.virtual}" if self.virtual > 1 else ""
        name = f"TP{self.tensor}PP{self.pipeline}{chunks}CP{self.context}DP{self.data}"
        experts = f"EP{self.expert}" if self.expert > 1 else ""
        shared = f"ETP{self.expert_tensor}" if self.expert_tensor else ""
        return name + ("SP" if self.sequence_parallel else "") + experts + shared


def make_config(mesh: Mesh, **overrides: Any) -> Config:
    """Return the tests' configuration. `overrides` are dotted keys, with a double underscore for each dot."""
    tree: dict[str, Any] = {
        "model": {"path": "unused", "init": "random"},
        "data": {"files": ["unused"], "max_prompt_tokens": 16},
        "parallel": {
            "tensor_parallel": mesh.tensor,
            "pipeline_parallel": mesh.pipeline,
            "virtual_pipeline_parallel": mesh.virtual,
            "context_parallel": mesh.context,
            "sequence_parallel": mesh.sequence_parallel,
            "expert_parallel": mesh.expert,
            "expert_tensor_parallel": mesh.expert_tensor,
            "timeout_minutes": 5,
            "hang_minutes": 5,
        },
        "rollout": {"group_size": 4, "max_response_tokens": 24},
        "sampling": {"train_batch_prompts": 4, "gen_batch_prompts": 4},
        "algo": {"old_logprobs": "rollout", "dual_clip": 3.0},
        "batch": {"mini_batch_prompts": 4, "max_tokens": 64},
        "optimizer": {"lr": LR, "warmup_updates": 0, "weight_decay": 0.1, "beta2": 0.95, "clip_grad": 0.5},
    }
    for key, value in overrides.items():
        *sections, leaf = key.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return parse_config(tree)


def hf_config(family: str = "qwen2", tied: bool = False) -> Any:
    """Return a small model. `family` may end in its number of layers: "qwen2, 7"."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    family, _, layers = family.partition(", ")
    common = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=int(layers or LAYERS),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10.0},
        attn_implementation="sdpa",
        initializer_range=0.08,
    )
    if family == "qwen3":
        return Qwen3Config(**common, head_dim=32, architectures=["Qwen3ForCausalLM"])
    if family == "llama":
        return LlamaConfig(**common, architectures=["LlamaForCausalLM"])
    return Qwen2Config(**common, architectures=["Qwen2ForCausalLM"])


class DictReader:
    """HF tensors from a dictionary."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = state

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        tensor = self.state[name].float()
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)


def start_weights(family: str, tied: bool) -> dict[str, torch.Tensor]:
    """Return fp32 weights for a well-conditioned comparison: no norm or bias at 0 or 1, a residual stream dominated by the
    embedding, attention far from uniform. With plain initialisation the gradients of q and k nearly cancel, and Hugging
    Face's own fp32 gradients are off by several 1e-6 from its fp64 ones; here they are off by less than 1e-6 too.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    state = AutoModelForCausalLM.from_config(hf_config(family, tied)).float().state_dict()
    noise = torch.Generator().manual_seed(1)
    for name, tensor in state.items():
        if tensor.dim() == 1:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=noise))
        if "q_proj" in name or "k_proj" in name:
            tensor.mul_(2.0)
        if "embed_tokens" in name:
            tensor.mul_(20.0)
    if tied:
        state["model.norm.weight"].mul_(0.05)  # the large embedding would make the logits extreme
    return state


def make_batch(seed: int = 5, num_groups: int = 4, group_size: int = 4) -> TrainBatch:
    """Return ragged samples, the second fully masked. Right and wrong answers use different words, as real ones do, so that
    their gradients add up instead of cancelling."""
    rng = np.random.default_rng(seed)
    count = num_groups * group_size
    prompts, responses = rng.integers(3, 13, count), rng.integers(1, 25, count)
    offsets = np.concatenate([[0], np.cumsum(prompts + responses)]).astype(np.int64)
    right = np.isin(np.arange(count) % group_size, (0, 3))
    mask = np.zeros(offsets[-1], dtype=bool)
    tokens = rng.integers(0, VOCAB, offsets[-1])
    for sample in range(count):
        where = slice(offsets[sample], offsets[sample + 1])
        words = (5 if right[sample] else 9) + rng.integers(0, 2, where.stop - where.start)
        tokens[where] = np.where(rng.random(len(words)) < 0.9, words, tokens[where])
        response = slice(where.start + prompts[sample], where.stop)
        mask[response] = sample != 1 and rng.random(responses[sample]) < 0.8
    return TrainBatch(
        tokens=tokens.astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=np.zeros(offsets[-1], dtype=np.float32),
        offsets=offsets,
        rewards=np.where(right, 1.0, -1.0) + 0.1 * rng.normal(size=count),
        group_ids=np.repeat(np.arange(num_groups), group_size),
        in_statistics=np.ones(count, dtype=bool),
    )


def multi_turn_batch() -> TrainBatch:
    """Return make_batch with tool output between the turns of each response, off-policy. Responses of odd numbers begin with tool
    output, some end in it, and the second has no token of the policy. Log-probs of tokens without loss are NaN: nothing may
    read them."""
    batch = make_batch()
    rng, mask = np.random.default_rng(11), np.zeros_like(batch.loss_mask)
    for sample, (begin, end) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:])):
        if (written := np.flatnonzero(batch.loss_mask[begin:end])).size:
            turns = np.repeat(np.arange(24) % 2 == sample % 2, rng.integers(1, 8, 24))
            mask[begin + written[0] : end] = turns[: end - begin - written[0]]
            mask[end - 1] |= not mask[begin:end].any()
    batch = off_policy(replace(batch, loss_mask=mask))
    return replace(batch, rollout_logprobs=np.where(mask, batch.rollout_logprobs, np.nan).astype(np.float32))


def off_policy(batch: TrainBatch, model: torch.nn.Module | None = None) -> TrainBatch:
    """Return the batch with old log-probs near the policy's, and a few far away, so that every clip is active."""
    model = model or model64("qwen2", False)
    noise = np.random.default_rng(3)
    old = np.zeros(len(batch.tokens))
    for begin, end in zip(batch.offsets[:-1], batch.offsets[1:]):
        tokens = torch.from_numpy(batch.tokens[begin:end].astype(np.int64))
        with torch.no_grad():
            logp = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        drift = 0.2 * noise.standard_normal(len(logp)) - 1.5 * (noise.random(len(logp)) < 0.05)
        old[begin + 1 : end] = logp.numpy() + drift
    return replace(batch, rollout_logprobs=np.where(batch.loss_mask, old, 0).astype(np.float32))


def dapo_loss(model: torch.nn.Module, batch: TrainBatch, low: float, high: float, dual: float) -> torch.Tensor:
    """Return the objective in its plainest form: sample by sample, with log_softmax over whole logits."""
    total, count = torch.zeros((), dtype=torch.float64), int(batch.loss_mask.sum())
    for group in np.unique(batch.group_ids):
        rewards = torch.from_numpy(batch.rewards[batch.group_ids == group])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for sample, advantage in zip(np.flatnonzero(batch.group_ids == group), advantages):
            where = slice(batch.offsets[sample], batch.offsets[sample + 1])
            tokens = torch.from_numpy(batch.tokens[where].astype(np.int64))
            mask = torch.from_numpy(batch.loss_mask[where])[1:]
            logits = model(tokens[None]).logits[0, :-1]
            logp = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0][mask]
            old = torch.from_numpy(batch.rollout_logprobs[where].astype(np.float64))[1:][mask]
            ratio = (logp - old).clamp(-20, 20).exp()
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
            total = total + (torch.minimum(loss, -advantage * dual) if advantage < 0 else loss).sum()
    return total / count


def model64(family: str, tied: bool) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(hf_config(family, tied)).double()
    model.load_state_dict(start_weights(family, tied))
    norms_in_fp64(model)
    return model


def reference(batch: TrainBatch, family: str = "qwen2", tied: bool = False) -> dict[str, Any]:
    """Return the gradients of step 1, the gradient norms, and the parameters after STEPS steps, all fp64 and HF-named."""
    model = model64(family, tied)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    result: dict[str, Any] = {"norms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        dapo_loss(model, batch, 0.2, 0.28, 3.0).backward()
        if step == 0:
            result["grads"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        result["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    result["params"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


def norms_in_fp64(model: torch.nn.Module) -> None:
    """Make RMSNorm compute in fp64. Hugging Face uses fp32 for any dtype of the model, which is not exact enough for a reference."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.variance_epsilon

            def forward(x: torch.Tensor, weight: torch.Tensor = module.weight, eps: float = eps) -> torch.Tensor:
                return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

            module.forward = forward


def spawn(worker: Any, mesh: Mesh, *args: Any) -> list[Any]:
    """Run `worker(layout, mesh, *args)` on every process of a new job, and return what it returned on rank 0, through JSON."""
    multiprocessing.set_forkserver_preload([f"{__package__}.preload"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (worker, mesh, folder, args), nprocs=mesh.world_size, start_method="forkserver")
        return json.loads((Path(folder) / "result.json").read_text())


def _enter(rank: int, worker: Any, mesh: Mesh, folder: str, args: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    from dapo_mcore.actor.parallel import layout as layouts

    os.environ.update(LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=mesh.world_size)
    config = make_config(mesh)
    layout = layouts.start(config.parallel, seed=0)
    result = worker(layout, mesh, *args)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    layouts.stop()


def build_actor(config: Config, layout: Any, family: str = "qwen2", tied: bool = False) -> Any:
    from dapo_mcore.actor.actor import Actor

    return Actor(config, hf_config(family, tied), layout, DictReader(start_weights(family, tied)))


def gather_named(actor: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return whole HF-named tensors on rank 0, from local ones named as by the policy's `named_weights`."""
    from dapo_mcore.actor.weight_stream import WeightStream

    stream = WeightStream(actor.policy, actor.shape, actor.layout)
    stream.local = tensors
    return {name: tensor.clone() for name, tensor in stream()}


def buffers(actor: Any) -> list[Any]:
    """Return DDP's gradient buffers, of an actor or a critic."""
    return [buffer for chunk in actor.ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]


def gather_shards(model: Any) -> None:
    """Gather the reduced gradients of the distributed optimizer into main_grad of every rank. model  an actor or a critic."""
    import torch.distributed as dist

    for buffer in buffers(model):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
            parts = [torch.empty_like(shard) for _ in range(group.size())]
            dist.all_gather(parts, shard, group=group)
            bucket.grad_data.copy_(torch.cat(parts))


def local_gradients(actor: Any) -> dict[str, torch.Tensor]:
    """Return main_grad of every parameter. With the distributed optimizer, gather its reduced shards first."""
    if actor.config.optimizer.distributed:
        gather_shards(actor)
    return {name: p.main_grad.clone() for name, p in actor.policy.named_weights() if p.requires_grad}


def capture_first_gradient(actor: Any) -> dict[str, torch.Tensor]:
    """Return a dictionary that the actor's next update fills with its HF-named gradient (rank 0), before the optimizer step."""
    found: dict[str, torch.Tensor] = {}
    prepare = actor.optimizer.prepare

    def capture_and_prepare() -> float:
        found.update(gather_named(actor, local_gradients(actor)))
        actor.optimizer.prepare = prepare
        return prepare()

    actor.optimizer.prepare = capture_and_prepare
    return found


def scored_step(config: Config, layout: Any, batch: TrainBatch, actor: Any, seed: int | None = None) -> Any:
    """Scatter and score the batch as the training loop does."""
    from dapo_mcore.actor.learner import Learner
    from dapo_mcore.actor.scatter import scatter_step

    share = scatter_step(
        batch if layout.is_controller else None,
        config,
        layout,
        mini_batch_prompts=config.batch.mini_batch_prompts,
        seed=seed,
    )
    return Learner(actor, pad_token=0).score(share)


def shared_step(config: Config, layout: Any, batch: TrainBatch, actor: Any, seed: int | None = None) -> Any:
    """Return the mini-batches of scored_step."""
    return scored_step(config, layout, batch, actor, seed).mini_batches


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest ‖Δ‖₂ / ‖g‖₂ over all tensors. Every expected name must be there, and no other."""
    assert found.keys() == {name for name in expected if name in found} and len(found) == len(expected), sorted(
        set(expected) ^ set(found)
    )
    return max(float((found[name].double() - expected[name]).norm() / expected[name].norm()) for name in expected)


def save_problem(path: Path, batch: TrainBatch, family: str = "qwen2", tied: bool = False) -> Path:
    """Write a batch with its fp64 solution to `path`, for worker processes."""
    fields = {name: getattr(batch, name) for name in TrainBatch.__dataclass_fields__}
    torch.save({"batch": fields, "family": family, "tied": tied, **reference(batch, family, tied)}, path)
    return path


def load_problem(path: str) -> tuple[TrainBatch, dict[str, Any]]:
    problem = torch.load(path, weights_only=False)  # this test has written the file itself
    return TrainBatch(**problem["batch"]), problem


def gradient_of(actor: Any, mini_batch: Any) -> dict[str, torch.Tensor]:
    """Return the HF-named gradient on rank 0, without an optimizer step."""
    actor.backward(mini_batch)
    return gather_named(actor, local_gradients(actor))
