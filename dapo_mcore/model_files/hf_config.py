"""The configuration, tokenizer and stop tokens of a Hugging Face model folder.

Change here: which files of the folder are read, and what is refused before anything is built from them. Weights are read
by hf_folder.py.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_mcore.architecture.shape import weight_shape
from dapo_mcore.config.model import ModelConfig
from dapo_mcore.errors import ConfigError, one_line
from dapo_mcore.model_files.config_json import check_numbers, read_json_object
from dapo_mcore.model_files.model_folder import model_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")
# Splits differently under nearly every pre-tokenizer: words, digits, punctuation, newlines, non-ASCII text.
_PROBE = "Solve 12+345=; the Answer: \\frac{1}{2}.\n\n  It's é 中 #### 7"


def load_hf_config(model: ModelConfig) -> PretrainedConfig:
    """Return the model's configuration: config.json, with `model.overrides` applied before it is built.

    So derived fields (such as a list with one entry per layer) follow an overridden number of layers.
    Raises ConfigError as model_folder does, for a missing file, an unknown architecture or override key, and overrides that change the
    size of stored weights.
    """
    from transformers import AutoConfig

    folder = model_folder(model)
    stored = _read_json(folder, "config.json")
    check_numbers(stored, str(folder / "config.json"))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # each class checks its settings in its own way
        raise ConfigError(f"transformers cannot read {folder / 'config.json'}: {one_line(error)}") from error
    if not model.overrides:
        return config
    _refuse_unknown(model.overrides, {*stored, *config.to_dict(), *config.attribute_map, *_ROPE})
    settings = _overridden(stored, model.overrides)
    check_numbers(settings, f"model.overrides over {folder / 'config.json'}")
    try:
        changed = type(config).from_dict(settings)
    except Exception as error:
        raise ConfigError(
            f"model.overrides {model.overrides} make no valid {type(config).__name__}: {one_line(error)}"
        ) from error
    if model.init == "pretrained":
        _check_sizes_stay(config, changed)
    return changed


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the folder's tokenizer, which always has an EOS token.

    transformers rebuilds the tokenizer of a known architecture from its vocabulary and ignores the other parts of
    tokenizer.json; where that changes the tokens, tokenizer.json wins, since the weights were trained on it.
    Raises ConfigError as model_folder does, for missing tokenizer files, or no EOS token.
    """
    from transformers import AutoTokenizer

    folder = model_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise ConfigError(
            f"no tokenizer can be loaded from {folder}: {one_line(error)}; it needs tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise ConfigError(
            f"no tokenizer can be loaded from {folder}: its files give no vocabulary; it needs tokenizer.json and "
            f"tokenizer_config.json of the model"
        )
    tokenizer = _as_stored(tokenizer, folder)
    if tokenizer.eos_token_id is None or not _is_stored(tokenizer.eos_token, folder):
        invented = f" ({tokenizer.eos_token!r} is only its class's default)" if tokenizer.eos_token else ""
        raise ConfigError(
            f"the tokenizer in {folder} has no EOS token{invented}, so no response could ever end; "
            f'set "eos_token" in its tokenizer_config.json to a token of its vocabulary'
        )
    return tokenizer


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, hf_config: PretrainedConfig) -> None:
    """Raise ConfigError if the tokenizer has a token for which the model's embedding has no row."""
    vocab_size = hf_config.get_text_config().vocab_size
    token, token_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if token_id >= vocab_size:
        raise ConfigError(
            f"the tokenizer's token {token!r} has id {token_id}, but the model has vocab_size {vocab_size}; "
            f"use the model's own tokenizer, or a vocab_size of at least {token_id + 1} with model.init random"
        )


def max_positions(hf_config: PretrainedConfig) -> int:
    """Return the length of the longest sequence that engines and actor accept: max_position_embeddings, whatever the RoPE scaling.

    If YaRN reaches further than that number, as in Qwen2.5's recipe, it must be raised in config.json, for SGLang too.
    Raises ConfigError where the configuration has no such number.
    """
    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise ConfigError(
            f"config.json of a {hf_config.model_type} model must say max_position_embeddings, the longest sequence in "
            f"tokens, but it is {positions!r}; add it"
        )
    return positions


def stop_token_ids(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a response: eos_token_id of generation_config.json (one or a list), then the tokenizer's EOS.

    The two differ in practice: Qwen2.5-Instruct stops at <|im_end|> and <|endoftext|>, its base model at the latter.
    """
    folder = model_folder(model)
    stored: Any = None
    if (folder / "generation_config.json").is_file():
        stored = _read_json(folder, "generation_config.json").get("eos_token_id")
    ids = stored if isinstance(stored, list) else [] if stored is None else [stored]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ConfigError(
                f"{folder / 'generation_config.json'}: eos_token_id must be a token id or a list of them, got {stored!r}"
            )
    return tuple(dict.fromkeys([*ids, tokenizer.eos_token_id]))


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token. No loss and no attended position ever reads it."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ConfigError(
            f"no {name} in {folder}; it has {', '.join(sorted(p.name for p in folder.iterdir())) or 'no files'}"
        )
    return read_json_object(path)


def _overridden(stored: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of config.json with the overrides.

    A rotary embedding has three spellings, of which transformers takes rope_parameters first; an override in another one must
    still count.
    """
    settings = {**stored, **overrides}
    if "num_hidden_layers" in overrides:
        settings.pop("layer_types", None)  # one entry a layer: the class derives a list of the new length
    if "rope_parameters" in overrides:
        return {key: value for key, value in settings.items() if key not in _ROPE[1:]}
    if (rope := stored.get("rope_parameters")) and overrides.keys() & {*_ROPE[1:]}:
        theta = overrides.get("rope_theta", rope.get("rope_theta"))
        scaling = overrides["rope_scaling"] or {} if "rope_scaling" in overrides else rope
        settings["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": theta}
        settings.pop("rope_theta", None)
        settings.pop("rope_scaling", None)
    return settings


def _check_sizes_stay(stored: PretrainedConfig, changed: PretrainedConfig) -> None:
    """Raise ConfigError if stored weights do not fit the changed configuration."""
    before, after = weight_shape(stored, 1), weight_shape(changed, 1)
    differ = [
        f"{field.name} from {one_line(getattr(before, field.name), 40)} to {one_line(getattr(after, field.name), 40)}"
        for field in fields(before)
        if getattr(before, field.name) != getattr(after, field.name)
    ]
    if differ:
        raise ConfigError(
            f"model.overrides would change the weights that model.path stores: {', '.join(differ)}; leave these keys out, or set "
            "model.init random"
        )


def _refuse_unknown(overrides: dict[str, Any], known: set[str]) -> None:
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"model.overrides has {key!r}, which this architecture's config.json does not know{hint}")


def _is_stored(token: str, folder: Path) -> bool:
    """Return True if the folder's vocabulary has the token. transformers adds default special tokens to any vocabulary."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    return not file.is_file() or Tokenizer.from_file(str(file)).token_to_id(token) is not None


def _as_stored(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer if it splits text as tokenizer.json does, else one that is built from tokenizer.json alone."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.is_file():
        return tokenizer  # vocab.json and merges.txt, or SentencePiece: the class is all there is
    stored = Tokenizer.from_file(str(file))
    try:
        same = tokenizer.encode(_PROBE, add_special_tokens=False) == stored.encode(_PROBE, add_special_tokens=False).ids
    except Exception:  # a word-level vocabulary without <unk> refuses the probe
        same = False
    return tokenizer if same else PreTrainedTokenizerFast.from_pretrained(folder)
