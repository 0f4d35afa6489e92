"""The policy: Megatron GPTModels that return hidden states. The policy head (actor/head.py) computes logits and losses.

Change here: how the model objects are built, and the names of their parameters across ranks. architecture/ says what the model
computes, transformer_config.py sets Megatron's options, layers.py chooses the parts of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from dapo_mcore.actor.model.fp8_layers import quantizer, simulate
from dapo_mcore.actor.model.fp8_rules import bf16_layers, format_of, recipe_of
from dapo_mcore.actor.model.latent import set_latent_eps
from dapo_mcore.actor.model.layers import accumulate_in_products, layer_specs
from dapo_mcore.actor.model.offload import LayerInputOffload
from dapo_mcore.actor.model.routing import ExpertRouting, share_routing
from dapo_mcore.actor.model.transformer_config import transformer_config
from dapo_mcore.actor.parallel.layout import Layout
from dapo_mcore.architecture.mapping import WeightReader, find_parameter, import_parameter
from dapo_mcore.architecture.reader import Architecture, read_architecture
from dapo_mcore.architecture.shape import WeightShape, padded_vocab_size
from dapo_mcore.architecture.tensor_check import FiniteReader
from dapo_mcore.config.schema import Config
from dapo_mcore.errors import ConfigError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
VALUE_HEAD = "value_head."
"""Begins the names of a critic's parameters that no HF model has."""
_EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)(.*)")


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns hidden states, so the logits of a whole batch never exist.

    expert_routing  what its routers share; None without experts
    offload         keeps its layers' inputs on the host; None without model.offload_activations
    """

    expert_routing: ExpertRouting | None = None
    offload: LayerInputOffload | None = None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return GPTModel's output, and let the saved inputs of its layers wait on the host if it offloads them."""
        with self.offload.forward_pass() if self.offload else nullcontext():
            return super().forward(*args, **kwargs)

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the hidden states [s, b, H]; under sequence parallelism, this rank's rows. Overrides megatron-core 0.16.1."""
        return hidden_states

    def head_weight(self) -> torch.Tensor:
        """Return the output projection, [V/tp, H]; if tied, it is the embedding."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of all stored weights: the parameters, and the routers' fixed biases (DeepSeek).

        A name has the layer and expert numbers of the whole model.
        """
        yield from ((self._global_name(name), parameter) for name, parameter in self.named_parameters())
        biases = ((name, buffer) for name, buffer in self.named_buffers() if name.endswith("router.expert_bias"))
        yield from ((self._global_name(name), buffer) for name, buffer in biases)

    def _global_name(self, name: str) -> str:
        match = _LAYER.fullmatch(name)
        if not match:
            return name
        layer, rest = self.decoder.layers[int(match[1])], match[2]
        if expert := _EXPERT.fullmatch(rest):
            rest = f"{expert[1]}{layer.mlp.local_expert_indices[int(expert[2])]}{expert[3]}"
        return f"decoder.layers.{layer.layer_number - 1}.{rest}"


class ValueModel(PolicyModel):
    """A critic's part of the model: the last stage has a value head instead of an output projection.

    The head is in fp32 and starts at 0, so that no random number decides how a run starts. Tensor-parallel ranks have copies.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"share_embeddings_and_output_weights": False})
        if self.post_process:
            del self.output_layer
            self.value_head = torch.nn.Linear(self.config.hidden_size, 1, dtype=torch.float32)
            torch.nn.init.zeros_(self.value_head.weight)
            torch.nn.init.zeros_(self.value_head.bias)

    def head_weight(self) -> torch.Tensor:
        """Return the value head's weight, [1, H]."""
        return self.value_head.weight

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return Megatron's description of the parameters. GPTModel's own (megatron-core 0.16.1) asks for an output projection."""
        found = MegatronModule.sharded_state_dict(self, prefix, *args, **kwargs)
        if self.pre_process:
            found[f"{prefix}embedding.word_embeddings.weight"].allow_shape_mismatch = True  # the padded vocabulary
        return found


class Policy(torch.nn.ModuleList):
    """This rank's part of the policy: its chunks of the model (PolicyModel), in the order of their layers.

    There is one chunk, or `parallel.virtual_pipeline_parallel` of them. With two per stage on two stages, rank 0 has the first
    and third quarter of the layers, and the embedding; rank 1 has the second and fourth quarter, and the head. All chunks share
    one TransformerConfig.
    """

    @property
    def config(self) -> TransformerConfig:
        return self[0].config

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the `named_weights` of all chunks. No name occurs twice on a rank."""
        for chunk in self:
            yield from chunk.named_weights()

    def load_weights(self, reader: WeightReader, shape: WeightShape, layout: Layout) -> None:
        """Fill `named_weights` from HF tensors, reading only this rank's slices. A value head stays as it is.

        Raises CheckpointError for NaN and infinite values, ConfigError if shapes do not match the config.
        """
        reader = FiniteReader(reader)
        with torch.no_grad():
            for name, weight in self.named_weights():
                if name.startswith(VALUE_HEAD):
                    continue
                parameter = find_parameter(name, shape)
                rank, size = layout.tensor_rank, layout.tensor
                if parameter.rule.per_expert:
                    rank, size = layout.expert_tensor_rank, layout.expert_tensor
                value = import_parameter(parameter, reader, shape, rank, size)
                if value.shape != weight.shape:
                    raise ConfigError(
                        f"{name}: config.json implies shape {tuple(weight.shape)} on this rank, "
                        f"but the stored tensors give {tuple(value.shape)}; config.json and weights disagree"
                    )
                weight.copy_(value)


def build_policy(config: Config, hf_config: Any, layout: Layout, kind: type[PolicyModel] = PolicyModel) -> Policy:
    """Return this rank's part of the policy, with uninitialised weights; of a critic with `kind` ValueModel.

    Raises ConfigError if it cannot be built.
    """
    architecture = read_architecture(hf_config, config.longest_sequence)
    megatron_config = transformer_config(config, architecture)
    numbers = range(config.parallel.virtual_pipeline_parallel)
    chunks = [_build_chunk(kind, config, architecture, megatron_config, layout, number) for number in numbers]
    return Policy(chunks).to(layout.device)


def _build_chunk(
    kind: type[PolicyModel],
    config: Config,
    architecture: Architecture,
    megatron_config: TransformerConfig,
    layout: Layout,
    number: int,
) -> PolicyModel:
    is_last = number == config.parallel.virtual_pipeline_parallel - 1
    model = kind(
        megatron_config,
        layer_specs(megatron_config, number),
        vocab_size=padded_vocab_size(architecture.vocab_size, layout.tensor),
        max_sequence_length=architecture.max_positions,
        pre_process=layout.is_first_stage and number == 0,
        post_process=layout.is_last_stage and is_last,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        rotary_base=architecture.rope.base,
        vp_stage=number,
    )
    accumulate_in_products(model)
    if megatron_config.multi_latent_attention:  # its layers have their own rotary embeddings
        set_latent_eps(model)
    else:
        # in 0.16.1 a plain attribute, first read in the forward pass; every kind of RoPE scaling only changes the frequencies
        model.rotary_pos_emb.inv_freq = architecture.rope.frequencies
    if (fp8 := config.model.fp8) and megatron_config.transformer_impl == "local":
        found = quantizer(recipe_of(fp8), format_of(fp8))
        simulate(model.decoder.layers, found, bf16_layers(fp8, architecture.num_layers))
    model.expert_routing = share_routing(model, config.model, layout)
    if config.model.offload_activations:
        model.offload = LayerInputOffload(model.decoder.layers, layout.device)
    return model
