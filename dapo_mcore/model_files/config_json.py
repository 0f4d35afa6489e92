"""The JSON files of a model folder: strict JSON, and numbers that a model can have.

Change here: what makes a config.json unusable whatever its architecture. architecture/reader.py says what a key means.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dapo_mcore.errors import ConfigError

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("decoder_sparse_step", "n_group", "topk_group"),
    *("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
)
_COUNTS = ("shared_expert_intermediate_size", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
_POSITIVE = ("rms_norm_eps", "rope_theta", "routed_scaling_factor")
_ROPE_POSITIVE = (
    *("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "attention_factor"),
)
_LARGEST = 2**31 - 1
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\xef\xbb\xbf": "UTF-8 with a byte order mark"}


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a UTF-8 file.

    Raise ConfigError with the place for another encoding, broken JSON, NaN, or a key given twice.
    """
    raw = path.read_bytes()
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            raise ConfigError(f"{path} is {encoding}; save it as plain UTF-8, which transformers reads")
    try:
        tree = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}; correct it, or fetch it again") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(tree).__name__}")
    return tree


def check_numbers(settings: dict[str, Any], source: str) -> None:
    """Raise ConfigError, naming every number of a config.json that no model can have. `source` says where they are from."""
    if problems := list(_problems(settings)):
        raise ConfigError(f"{source}: {'; '.join(problems)}; correct the numbers, or fetch the file again")


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    for names, least in ((_SIZES, 1), (_COUNTS, 0)):
        for name in names:
            value = settings.get(name)
            if value is not None and not (type(value) is int and least <= value <= _LARGEST):
                yield f"{name} {value!r} must be a whole number from {least} to {_LARGEST}"
    yield from _not_positive(settings, _POSITIVE, "")
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.get(key)
        if rope is not None and not isinstance(rope, dict):
            yield f"{key} {rope!r} must be an object"
        elif rope:
            yield from _not_positive(rope, _ROPE_POSITIVE, f"{key}.")
    yield from _too_many_chosen(settings)


def _not_positive(settings: dict[str, Any], names: tuple[str, ...], prefix: str) -> Iterator[str]:
    for name in names:
        value = settings.get(name)
        if value is not None and not (type(value) in (int, float) and math.isfinite(value) and value > 0):
            yield f"{prefix}{name} {value!r} must be a finite number above 0"


def _too_many_chosen(settings: dict[str, Any]) -> Iterator[str]:
    """Raise ConfigError if a token would choose more experts, or groups of experts, than there are."""
    experts = [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in settings]
    for part, whole in [*(("num_experts_per_tok", name) for name in experts), ("topk_group", "n_group")]:
        chosen, available = settings.get(part), settings.get(whole)
        if type(chosen) is int and type(available) is int and chosen > available:
            yield f"{part} {chosen} exceeds {whole} {available}"


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from its pairs (json's object_pairs_hook). Raise ValueError for a key given twice: Python alone
    would keep the last one."""
    if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"{repeated[0]!r} is given twice")
    return dict(pairs)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
