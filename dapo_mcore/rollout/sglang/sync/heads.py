"""The output projection, for those of SGLang's model classes that keep one of their own in a tied model.

Change here: which classes these are. Source: models/qwen2_moe.py, qwen3_moe.py and mixtral.py of SGLang 0.5.21. None of
them looks at tie_word_embeddings, so without a word the head would stay as the server filled it at start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

_WITH_OWN_HEAD = frozenset({"MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"})


def with_heads(
    weights: Iterator[tuple[str, Tensor]], architecture: str, tied: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The stream with every tied tensor right after its owner, where SGLang's class of `architecture` wants both.

    tied  each name that shares another's storage, with the name that owns it, as of WeightManifest.
    """
    if architecture not in _WITH_OWN_HEAD or not tied:
        yield from weights
        return
    for name, tensor in weights:
        if name in tied:
            continue
        yield name, tensor
        for other, owner in tied.items():
            if owner == name:
                yield other, tensor.clone()  # sync tensor gives a tensor's memory away
