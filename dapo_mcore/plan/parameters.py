"""How many parameters a rank holds, counted by the same weight rules that load, save and send them.

Change here: what one rank of the mesh holds. Sizes come from architecture/mapping.py: none is written down twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from dapo_mcore.actor.host_copy import pinned_bytes
from dapo_mcore.architecture.mapping import Parameter, hf_shapes, layer_rules, local_shape
from dapo_mcore.architecture.shape import WeightShape
from dapo_mcore.architecture.weight_rules import EMBEDDING, FINAL_NORM, OUTPUT, WeightRule
from dapo_mcore.config.optimizer import OptimizerConfig
from dapo_mcore.plan.job import Job

_ALIGN, _BUCKET = 64, 128
"""megatron-core's distributed optimizer starts each parameter at a multiple of 64 and ends a bucket at one of 128 and of the
ranks that share it (param_and_grad_buffer.py, 0.16.1 and 0.19.2)."""


@dataclass(frozen=True)
class Counts:
    """Elements on one rank.

    dense, experts   trained parameters; those of experts that are distributed (expert_parallel above 1) apart
    linear           of both, the matrices of layers, which FP8 would copy
    embedding        of both, the vocabulary's matrices
    buffer, expert_buffer   elements of the gradient buffers: parameters with megatron-core's padding
    float32          elements that are not trained and stay float32: DeepSeek's routing bias with a count of tokens
                     beside it, and the tables of each layer's own YaRN embedding
    largest          elements of the largest single parameter
    pinned           bytes of the trained parameters as float32, each in pinned memory of its own
    critic           the same of a critic; None without one. Its value head counts in the model's dtype, though it is float32
    """

    dense: int
    experts: int
    linear: int
    embedding: int
    buffer: int
    expert_buffer: int
    float32: int
    largest: int
    pinned: int
    critic: Counts | None = None

    @property
    def trained(self) -> int:
        return self.dense + self.experts


@cache
def whole_model(shape: WeightShape) -> int:
    """Return the parameters of the model as a folder stores them, without padding."""
    kinds = Counter(shape.moe_layers)
    layers = [(rule, kinds[kind]) for kind in kinds for rule in layer_rules(shape, shape.moe_layers.index(kind))]
    outside = [(EMBEDDING, 1), (FINAL_NORM, 1), *([] if shape.tied else [(OUTPUT, 1)])]
    return sum(
        count * (shape.num_experts if rule.per_expert else 1) * math.prod(sizes)
        for rule, count in [*layers, *outside]
        for sizes in hf_shapes(Parameter(rule), shape)
    )


def stage_counts(job: Job, stage: int) -> Counts:
    """Return what each rank of a pipeline stage holds."""
    config, kinds = job.config, Counter(job.shape.moe_layers[layer] for layer in job.stages[stage])
    own = _Stage(
        shape=job.shape,
        layers=tuple(sorted((job.shape.moe_layers.index(kind), count) for kind, count in kinds.items())),
        is_first=stage == 0,
        is_last=stage == job.pipeline - 1,
        rotary=_rotary_tables(job),
        tensor=job.tensor,
        expert=config.parallel.expert_parallel,
        expert_tensor=config.parallel.expert_tensor_size,
        sharing=_sharing(job, config.optimizer),
        experts_sharing=job.expert_data,
    )
    if config.algo.advantage != "gae":
        return _counts(own)
    critic = own._replace(is_critic=True, sharing=_sharing(job, config.critic.optimizer))
    return replace(_counts(own), critic=_counts(critic))


def _sharing(job: Job, optimizer: OptimizerConfig) -> int:
    return job.data * job.context if optimizer.distributed else 0


class _Stage(NamedTuple):
    """What decides the elements of a stage's ranks. layers: (a layer of each kind, how many of it). sharing: ranks that share
    the optimizer's state; 0 if none do. is_critic: True with a value head instead of an output matrix."""

    shape: WeightShape
    layers: tuple[tuple[int, int], ...]
    is_first: bool
    is_last: bool
    rotary: int
    tensor: int
    expert: int
    expert_tensor: int
    sharing: int
    experts_sharing: int
    is_critic: bool = False


@cache
def _counts(stage: _Stage) -> Counts:
    layers = [
        held.times(count)
        for layer, count in stage.layers
        for held in _layer(stage.shape, layer, stage.tensor, stage.expert, stage.expert_tensor)
    ]
    outside = list(_outside_layers(stage))
    trained = [held for held in layers if not held.float32] + outside
    experts = [held for held in trained if held.per_expert and stage.expert > 1]
    is_tied = stage.shape.tied and not stage.is_critic
    # the first and the last stage divide a tied embedding alike: it has a bucket of its own
    shared = [held for held in outside if held.is_vocab and is_tied and stage.is_first != stage.is_last]
    others = [held for held in trained if held not in experts and held not in shared]
    return Counts(
        dense=_sum(others) + _sum(shared),
        experts=_sum(experts),
        linear=_sum(held for held in layers if held.is_matrix),
        embedding=_sum(held for held in outside if held.is_vocab),
        buffer=_padded(others, stage.sharing) + _padded(shared, stage.sharing),
        expert_buffer=_padded(experts, stage.sharing and stage.experts_sharing),
        float32=2 * _sum(held for held in layers if held.float32) + stage.rotary * sum(n for _, n in stage.layers),
        largest=max(held.size for held in trained),
        pinned=sum(pinned_bytes(4 * held.size) * held.count for held in trained),
    )


def _rotary_tables(job: Job) -> int:
    """Return the elements of the sines and cosines that each layer with latent attention keeps (yarn_rotary_pos_embedding.py)."""
    fields = job.architecture.fields
    if not job.shape.key_rank or fields["rope_type"] != "yarn":
        return 0
    return 2 * fields["original_max_position_embeddings"] * job.shape.rope_dim


@dataclass(frozen=True)
class _Held:
    """`count` parameters of `size` elements each."""

    size: int
    count: int
    per_expert: bool = False
    is_matrix: bool = False
    is_vocab: bool = False
    float32: bool = False

    def times(self, count: int) -> _Held:
        return _Held(self.size, self.count * count, self.per_expert, self.is_matrix, self.is_vocab, self.float32)


@cache
def _layer(shape: WeightShape, layer: int, tensor: int, expert: int, expert_tensor: int) -> tuple[_Held, ...]:
    found = []
    for rule in layer_rules(shape, layer):
        ranks, count = (expert_tensor, shape.num_experts // expert) if rule.per_expert else (tensor, 1)
        size = math.prod(local_shape(Parameter(rule, layer, 0 if rule.per_expert else -1), shape, ranks))
        found.append(_Held(size, count, rule.per_expert, _is_linear(rule), float32=rule.float32))
    return tuple(found)


def _is_linear(rule: WeightRule) -> bool:
    """Return True for the matrices that Transformer Engine's linear layers multiply; the router and a gate are not."""
    return len(rule.sizes[0]) == 2 and "router" not in rule.mcore[0] and not rule.mcore[0].endswith("gate_weight")


def _outside_layers(stage: _Stage) -> Iterator[_Held]:
    """Yield the embedding, the last norm and the output matrix or value head where a stage has them; a tied output is a copy on
    the last stage."""
    rules: list[WeightRule] = [EMBEDDING] if stage.is_first else []
    if stage.is_last:
        has_output = not stage.is_critic and not (stage.shape.tied and stage.is_first)
        rules += [FINAL_NORM, *([OUTPUT] if has_output else [])]
    if stage.is_last and stage.is_critic:
        yield from (_Held(stage.shape.hidden_size, 1), _Held(1, 1))
    for rule in rules:
        size = math.prod(local_shape(Parameter(rule), stage.shape, stage.tensor))
        yield _Held(size, 1, is_matrix=rule.is_vocab, is_vocab=rule.is_vocab)


def _sum(held: Iterable[_Held]) -> int:
    return sum(own.size * own.count for own in held)


def _padded(held: Iterable[_Held], ranks: int) -> int:
    """Return the elements of a gradient buffer with one bucket, whose parts `ranks` ranks share; 0 ranks need no padding."""
    if not ranks:
        return _sum(held)
    elements = sum(-(-own.size // _ALIGN) * _ALIGN * own.count for own in held)
    unit = math.lcm(_BUCKET, ranks)
    return -(-elements // unit) * unit
