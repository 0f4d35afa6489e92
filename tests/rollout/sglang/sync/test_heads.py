"""The output projection of tied models; that SGLang's own classes want it is shown in test_quantize.py."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig

from dapo_mcore.architecture.manifest import WeightManifest
from dapo_mcore.rollout.sglang.sync.heads import with_heads
from tests.rollout.sglang.serving import CONTEXT, VOCAB, engine
from tests.rollout.sglang.test_engine import servers, told

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {HEAD: EMBEDDING}


@pytest.mark.parametrize(
    ("architecture", "tied", "expected"),
    [
        ("Qwen3MoeForCausalLM", TIED, [(EMBEDDING, 0), (HEAD, 0), ("model.norm.weight", 2)]),
        ("Qwen3MoeForCausalLM", {}, [(EMBEDDING, 0), (HEAD, 1), ("model.norm.weight", 2)]),
        ("Qwen3ForCausalLM", TIED, [(EMBEDDING, 0), (HEAD, 1), ("model.norm.weight", 2)]),
    ],
)
def test_a_tied_head_is_the_embedding_where_sglang_keeps_both(architecture, tied, expected):
    stream = [(EMBEDDING, torch.tensor([0])), (HEAD, torch.tensor([1])), ("model.norm.weight", torch.tensor([2]))]
    assert [(name, tensor.item()) for name, tensor in with_heads(iter(stream), architecture, tied)] == expected


def test_servers_of_a_tied_moe_model_get_a_head(tmp_path):
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    more = dict(num_key_value_heads=1, max_position_embeddings=CONTEXT, num_experts=2, moe_intermediate_size=48)
    config = Qwen3MoeConfig(**sizes, **more, tie_word_embeddings=True, architectures=["Qwen3MoeForCausalLM"])
    shapes = WeightManifest.of_config(config).shapes
    with engine(tmp_path, config=config) as made:
        made.update_weights(
            ((name, torch.full(shape, 0.5)) for name, shape in shapes.items() if name != HEAD), version=0
        )
        loaded = told(servers(made)[0])["weights"]
        assert loaded[HEAD] == loaded[EMBEDDING] == 0.5 * VOCAB * 64
