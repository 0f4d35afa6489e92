"""HF → Megatron → HF: bit for bit for every family, dtype and cut; bad folders; interruptions."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dapo_mcore.errors import CheckpointError, ConfigError, DapoError
from dapo_mcore.weights import convert as conversion
from dapo_mcore.weights.convert import Cut, hf_to_mcore, mcore_to_hf
from dapo_mcore.weights.hf_io import SafetensorsReader
from dapo_mcore.weights.job import JOURNAL, NoReport
from tests.weights.conftest import TEXTS
from tests.weights.zoo import CONFIGS, MOE

Folders = Callable[..., Path]
DENSE_CUTS = [Cut(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2)]
MOE_CUTS = [Cut(), Cut(2, 1, 2), Cut(4, 2, 1), Cut(1, 2, 2), Cut(2, 2, 2, 2), Cut(2, 1, 4, 4)]
WHOLE = Cut()
SMALL, ONE_FILE = 20_000, 5_000_000_000
"""Bytes a file: some ten of them, or all in one."""


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """As the safetensors package reads them."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_model(ours: Path, theirs: Path) -> None:
    """Names, dtypes, shapes and bytes of all tensors, and every other file but the index."""
    found, expected = tensors_of(ours), tensors_of(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(raw(found[name]), raw(tensor)), name
    others = [path.name for path in theirs.iterdir() if "safetensors" not in path.name]
    assert {path.name for path in ours.iterdir() if "safetensors" not in path.name} == set(others)
    assert [name for name in others if (ours / name).read_bytes() != (theirs / name).read_bytes()] == []
    assert {"config.json", "generation_config.json", *TEXTS} <= set(others)


def round_trip(source: Path, work: Path, cut: Cut = WHOLE, shard_bytes: int = ONE_FILE) -> Path:
    hf_to_mcore(source, work / "mcore", cut, NoReport())
    mcore_to_hf(work / "mcore", work / "hf", NoReport(), shard_bytes)
    return work / "hf"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_round_trip_is_exact(family: str, dtype: torch.dtype, tmp_path: Path, hf_folder: Folders) -> None:
    """Every cut of Megatron's side; three layers on two stages; 101 words padded to 104, 112 or 128."""
    source = hf_folder(family, dtype, shard="20KB" if dtype == torch.float32 else "5GB")
    for number, cut in enumerate(MOE_CUTS if family in MOE else DENSE_CUTS):
        out = round_trip(source, tmp_path / str(cut), cut, SMALL if number % 2 else ONE_FILE)
        assert_same_model(out, source)
        assert (out / "model.safetensors").exists() != (out / "model.safetensors.index.json").exists()
        assert SafetensorsReader(out).names


def test_a_routing_bias_may_be_wider_than_the_rest(tmp_path: Path, hf_folder: Folders) -> None:
    """As in DeepSeek-V3's own files; every other tensor must not."""
    source = hf_folder("deepseek-v3", torch.bfloat16)

    def widen(state: dict[str, torch.Tensor]) -> None:
        state |= {name: tensor.float() for name, tensor in state.items() if name.endswith("correction_bias")}

    copy = edited_copy(source, tmp_path, widen)
    assert sorted(str(tensor.dtype) for tensor in tensors_of(copy).values())[-2:] == ["torch.float32"] * 2
    assert_same_model(round_trip(copy, tmp_path / "work", Cut(2, 2, 2)), copy)


def test_half_precision_and_sizes_that_the_padding_does_not_change(tmp_path: Path, hf_folder: Folders) -> None:
    source = hf_folder("qwen2", torch.float16, vocab_size=128)
    assert_same_model(round_trip(source, tmp_path, Cut(2)), source)


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3", "mixtral", "qwen2-moe-mixed"])
def test_transformers_computes_the_same_from_the_result(family: str, tmp_path: Path, hf_folder: Folders) -> None:
    source = hf_folder(family)
    out = round_trip(source, tmp_path, Cut(2, 2), SMALL)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits for folder in (out, source))
    assert torch.equal(ours, theirs)


def test_the_index_is_transformers_own(tmp_path: Path, hf_folder: Folders) -> None:
    source = hf_folder("qwen2", torch.float32, shard="20KB")
    out = round_trip(source, tmp_path, shard_bytes=SMALL)
    ours, theirs = (json.loads((folder / "model.safetensors.index.json").read_bytes()) for folder in (out, source))
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert set(ours["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    sizes = {path: sum(t.nbytes for t in load_file(path).values()) for path in out.glob("*.safetensors")}
    # a parameter's tensors stay together: gate and up, and here the query group, fit into one file
    assert len(sizes) > 3 and max(sizes.values()) <= SMALL


def test_a_folder_for_training(tmp_path: Path, hf_folder: Folders) -> None:
    """What hf-to-mcore writes: one file a layer and one each for the ends, named by the stage that reads it."""
    hf_to_mcore(hf_folder("qwen2"), tmp_path / "out", Cut(2, 2), NoReport())
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    chunks = {f"megatron/__{stage}_{number}.distcp" for number, stage in enumerate((0, 0, 0, 1, 1))}
    described = {"megatron/.metadata", "megatron/metadata.json", "megatron/common.pt"}
    assert files == {"config.json", "generation_config.json", *TEXTS, *chunks, *described}


def test_the_output_head_of_tied_embeddings_is_left_out(tmp_path: Path, hf_folder: Folders) -> None:
    """Older exports of tied models carry the copy; transformers writes none."""
    source = hf_folder("qwen2-tied")
    copy = edited_copy(source, tmp_path, lambda state: state.update({"lm_head.weight": state[EMBEDDING].clone()}))
    assert_same_model(round_trip(copy, tmp_path / "work"), source)


def test_buffers_that_every_model_makes_anew_are_left_out(tmp_path: Path, hf_folder: Folders) -> None:
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    copy = edited_copy(hf_folder("llama"), tmp_path, lambda state: state.update({extra: torch.ones(4)}))
    assert_same_model(round_trip(copy, tmp_path / "work"), hf_folder("llama"))


# ---- bad input -------------------------------------------------------------------------------------------------------

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


def edited_copy(source: Path, work: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The folder with its one file's tensors changed by `edit`."""
    copy = Path(shutil.copytree(source, work / "source"))
    state = load_file(copy / "model.safetensors")
    edit(state)
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    return copy


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refused(source: Path, work: Path, match: str, cut: Cut = WHOLE, error: type = DapoError) -> None:
    with pytest.raises(error, match=match):
        hf_to_mcore(source, work / "out", cut, NoReport())
    assert [path for path in work.iterdir() if path.name.startswith("out")] == []


TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda state: state.pop(NORM), rf"has no tensor {NORM}; it does not fit its config\.json"),
    "missing expert": (
        lambda state: state.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
        r"has no tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight",
    ),
    "extra": (
        lambda state: state.update({"model.layers.3.mlp.gate.weight": torch.ones(1)}),
        r"holds 1 tensors that Qwen2MoeForCausalLM has not, such as model\.layers\.3\.mlp\.gate\.weight",
    ),
    "shape": (
        lambda state: state.update({NORM: torch.ones(31)}),
        rf"{NORM} is \[31\], but config\.json implies \[32\]: they disagree",
    ),
    "transposed": (
        lambda state: state.update({EMBEDDING: state[EMBEDDING].t().contiguous()}),
        rf"{EMBEDDING} is \[32, 101\], but config\.json implies \[101, 32\]",
    ),
    "mixed dtypes": (
        lambda state: state.update({NORM: state[NORM].bfloat16()}),
        rf"{NORM} is torch\.bfloat16, {EMBEDDING} is torch\.float32; all must be one of",
    ),
    "int8": (
        lambda state: state.update({name: tensor.to(torch.int8) for name, tensor in state.items()}),
        r"embed_tokens\.weight is torch\.int8, .* all must be one of float32, bfloat16, float16",
    ),
    "float8": (
        lambda state: state.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}),
        r"embed_tokens\.weight is torch\.float8_e4m3fn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", TENSOR_EDITS)
def test_tensors_that_do_not_fit(edit: str, tmp_path: Path, hf_folder: Folders) -> None:
    change, told = TENSOR_EDITS[edit]
    refused(edited_copy(hf_folder("qwen2-moe"), tmp_path, change), tmp_path, told, error=CheckpointError)


def test_a_head_that_is_not_the_embedding_it_should_be_tied_to(tmp_path: Path, hf_folder: Folders) -> None:
    """transformers unties the two then; leaving one out would change the model."""
    copy = edited_copy(
        hf_folder("qwen2-tied"), tmp_path, lambda state: state.update({HEAD: state[EMBEDDING].clone() + 1})
    )
    refused(copy, tmp_path, rf"{HEAD} differs from {EMBEDDING}, but config\.json says tie_word_embeddings")


CONFIG_EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden": ({"hidden_size": 64}, r"is \[101, 32\], but config\.json implies \[101, 64\]"),
    "vocabulary": ({"vocab_size": 102}, r"embed_tokens\.weight is \[101, 32\], but config\.json implies \[102, 32\]"),
    "layers": ({"num_hidden_layers": 4, "layer_types": None}, r"has no tensor model\.layers\.3\."),
    "fewer layers": ({"num_hidden_layers": 2, "layer_types": None}, r"holds \d+ tensors that .* has not, such as model\.layers\.2"),
    "kv heads": ({"num_key_value_heads": 4}, r"k_proj\.weight is \[16, 32\], but config\.json implies \[32, 32\]"),
    "uneven heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
    "mlp": ({"intermediate_size": 40}, r"gate_proj\.weight is \[48, 32\], but config\.json implies \[40, 32\]"),
    "tied": ({"tie_word_embeddings": True}, "lm_head.weight differs from"),
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
    "unknown type": ({"model_type": "unheard-of"}, r"transformers cannot read .*config\.json"),
}  # fmt: skip


@pytest.mark.parametrize("edit", CONFIG_EDITS)
def test_configs_that_disagree_with_the_tensors(edit: str, tmp_path: Path, hf_folder: Folders) -> None:
    changes, told = CONFIG_EDITS[edit]
    copy = Path(shutil.copytree(hf_folder("qwen2"), tmp_path / "source"))
    set_config(copy, **changes)
    refused(copy, tmp_path, told)


def broken_files(folder: Path, how: str) -> str:
    """Breaks a folder of several files; what the error must say."""
    index = json.loads((folder / INDEX).read_bytes())
    shard = folder / index["weight_map"][NORM]
    if how == "truncated data":
        os.truncate(shard, shard.stat().st_size - 1)
        return rf"{shard.name} is truncated: .* ends at byte"
    if how == "truncated header":
        os.truncate(shard, 20)
        return rf"{shard.name} is truncated: its header"
    if how == "missing shard":
        shard.unlink()
        return rf"{shard.name} is missing; fetch"
    if how == "index names a stranger":
        index["weight_map"]["model.unheard.weight"] = shard.name
        (folder / INDEX).write_text(json.dumps(index))
        return rf"names model\.unheard\.weight in {shard.name}, which lacks it"
    if how == "index of two files":
        (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-20])
        return rf"{INDEX} is broken"
    if how == "no config":
        (folder / "config.json").unlink()
        return r"no config\.json in"
    (folder / INDEX).unlink()
    return "holds neither model.safetensors nor"


@pytest.mark.parametrize(
    "how",
    [
        "truncated data", "truncated header", "missing shard", "index names a stranger", "index of two files",
        "no config", "no index",
    ],
)  # fmt: skip
def test_broken_files(how: str, tmp_path: Path, hf_folder: Folders) -> None:
    copy = Path(shutil.copytree(hf_folder("qwen2", torch.float32, shard="20KB"), tmp_path / "source"))
    refused(copy, tmp_path, broken_files(copy, how))


@pytest.mark.parametrize(
    ("family", "cut", "told"),
    [
        ("qwen2", Cut(3), "--tensor-parallel 3 does not divide num_attention_heads 4; use one of 1, 2, 4$"),
        ("qwen2", Cut(8), "--tensor-parallel 8 does not divide"),
        ("qwen2", Cut(1, 4), "--pipeline-parallel 4 exceeds num_hidden_layers 3"),
        ("qwen2", Cut(1, 1, 2), "--expert-parallel 2 .* Qwen2ForCausalLM has no experts"),
        ("qwen2", Cut(1, 1, 1, 2), "--expert-tensor-parallel 2 .* Qwen2ForCausalLM has no experts"),
        ("qwen3-moe", Cut(1, 1, 3), "--expert-parallel 3 does not divide the number of experts, 4"),
        ("qwen3-moe", Cut(1, 1, 8), "--expert-parallel 8 does not divide the number of experts, 4"),
        ("qwen3-moe", Cut(1, 1, 1, 16), "tensor parallel 16 does not divide the 24 rows of .*experts"),
        ("qwen2-moe", Cut(4), None),
    ],
)
def test_layouts_that_do_not_fit(family: str, cut: Cut, told: str | None, tmp_path: Path, hf_folder: Folders) -> None:
    if told is None:
        hf_to_mcore(hf_folder(family), tmp_path / "out", cut, NoReport())
    else:
        refused(hf_folder(family), tmp_path, told, cut, ConfigError)


def test_folders_of_the_other_kind_and_outputs_that_exist(tmp_path: Path, hf_folder: Folders) -> None:
    source, mcore = hf_folder("qwen2"), tmp_path / "mcore"
    hf_to_mcore(source, mcore, Cut(), NoReport())
    with pytest.raises(CheckpointError, match="is a Megatron checkpoint already; the other direction is mcore-to-hf"):
        hf_to_mcore(mcore, tmp_path / "out", Cut(), NoReport())
    with pytest.raises(CheckpointError, match=r"holds no Megatron checkpoint: it lacks megatron/\.metadata"):
        mcore_to_hf(source, tmp_path / "out", NoReport())
    for convert in (
        lambda: hf_to_mcore(source, mcore, Cut(), NoReport()),
        lambda: mcore_to_hf(mcore, mcore, NoReport()),
    ):
        with pytest.raises(CheckpointError, match="mcore exists; give another folder, or remove it"):
            convert()
    assert [path.name for path in tmp_path.iterdir()] == ["mcore"]
    assert_same_model(round_trip_back(mcore, tmp_path), source)


def round_trip_back(mcore: Path, work: Path) -> Path:
    mcore_to_hf(mcore, work / "back", NoReport())
    return work / "back"


@pytest.mark.parametrize("how", ["truncated", "missing", "zeros", "metadata", "config"])
def test_broken_megatron_checkpoints(how: str, tmp_path: Path, hf_folder: Folders) -> None:
    hf_to_mcore(hf_folder("qwen2"), mcore := tmp_path / "mcore", Cut(2), NoReport())
    chunk = mcore / "megatron" / "__0_1.distcp"
    told = {
        "truncated": r"__0_1\.distcp is truncated: decoder\.layers\.",
        "missing": r"__0_1\.distcp is missing: decoder\.layers\.",
        "zeros": r"__0_1\.distcp is damaged: decoder\.layers\.",
        "metadata": r"\.metadata cannot be read",
        "config": r"decoder\.layers\.mlp\.linear_fc1\.weight is \[3, 96, 32\], but config\.json implies \[3, 80, 32\]",
    }
    if how == "truncated":
        os.truncate(chunk, chunk.stat().st_size - 1)
    elif how == "missing":
        chunk.unlink()
    elif how == "zeros":
        chunk.write_bytes(bytes(chunk.stat().st_size))
    elif how == "metadata":
        os.truncate(mcore / "megatron" / ".metadata", 100)
    else:
        set_config(mcore, intermediate_size=40)
    with pytest.raises(CheckpointError, match=told[how]):
        mcore_to_hf(mcore, tmp_path / "out", NoReport())
    assert [path.name for path in tmp_path.iterdir()] == ["mcore"]


def test_a_disk_too_small(tmp_path: Path, hf_folder: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    refused(hf_folder("qwen2"), tmp_path, r"out needs 0\.1 GB, but its disk has 0\.0 GB free")


# ---- interruptions ---------------------------------------------------------------------------------------------------


class Interrupting(NoReport):
    """Ctrl-C after so many tensors (-1: never), for every thread; remembers where the job began."""

    def __init__(self, after: int):
        self.left, self.began, self.count = after, (0, 0), 0

    def start(self, total: int, done: int) -> None:
        self.began = (total, done)

    def advance(self, num_bytes: int) -> None:
        self.count += 1
        if 0 < self.left <= self.count:
            raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(partial: Path) -> dict[str, int]:
    """Inodes and times of the finished files, by name."""
    done = json.loads((partial / JOURNAL).read_bytes())["done"]
    return {name: ((partial / name).stat().st_ino, (partial / name).stat().st_mtime_ns) for name in done}


@pytest.mark.parametrize("direction", ["hf-to-mcore", "mcore-to-hf"])
def test_an_interrupted_conversion_goes_on(direction: str, tmp_path: Path, hf_folder: Folders) -> None:
    source = hf_folder("qwen3-moe")
    hf_to_mcore(source, mcore := tmp_path / "mcore", Cut(2, 2, 2), NoReport())

    def convert(out: Path, report: Any) -> Path:
        if direction == "hf-to-mcore":
            hf_to_mcore(source, out, Cut(2, 2, 2), report)
        else:
            mcore_to_hf(mcore, out, report, SMALL)
        return out

    whole = contents(convert(tmp_path / "whole", counting := Interrupting(-1)))
    partial, finished = tmp_path / "out.partial", {}
    for after in (counting.count // 2, counting.count // 4):
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "out", Interrupting(after))
        assert not (tmp_path / "out").exists()
        assert times(partial) and finished.items() <= times(partial).items()
        finished = times(partial)
    convert(tmp_path / "out", report := Interrupting(-1))
    assert 0 < report.began[1] < report.began[0]
    kept = {
        name: ((tmp_path / "out" / name).stat().st_ino, (tmp_path / "out" / name).stat().st_mtime_ns)
        for name in finished
    }
    assert kept == finished
    assert not partial.exists()
    assert contents(tmp_path / "out") == whole


def test_other_options_or_inputs_start_anew(tmp_path: Path, hf_folder: Folders) -> None:
    source = Path(shutil.copytree(hf_folder("qwen2"), tmp_path / "source"))
    out = tmp_path / "out"

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            hf_to_mcore(source, out, Cut(), Interrupting(25))

    interrupted()
    hf_to_mcore(source, out, Cut(2), report := Interrupting(-1))
    assert report.began[1] == 0
    shutil.rmtree(out)
    interrupted()
    state = {name: tensor + 1 for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    hf_to_mcore(source, out, Cut(), report := Interrupting(-1))
    assert report.began[1] == 0
    assert_same_model(round_trip_back(out, tmp_path), source)


def test_a_disk_that_fills_up_in_the_middle(
    tmp_path: Path, hf_folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, count, original = hf_folder("qwen2-moe"), [], conversion.write_chunk

    def write_chunk(*arguments: Any) -> Any:
        count.append(1)
        if len(count) > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(CheckpointError, match="is full; free some space and start again"),
    ):
        patch.setattr(conversion, "write_chunk", write_chunk)
        hf_to_mcore(source, tmp_path / "out", Cut(2), NoReport())
    assert not (tmp_path / "out").exists()
    finished = times(tmp_path / "out.partial")
    hf_to_mcore(source, tmp_path / "out", Cut(2), report := Interrupting(-1))
    assert finished and report.began[1] > 0
    assert_same_model(round_trip_back(tmp_path / "out", tmp_path), source)


KILLED = """
import os, signal, sys
from pathlib import Path
from dapo_mcore.weights.convert import Cut, hf_to_mcore

class Killing:
    left = 60
    def start(self, total, done): ...
    def advance(self, num_bytes):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

hf_to_mcore(Path(sys.argv[1]), Path(sys.argv[2]), Cut(2, 1, 2), Killing())
"""


def test_a_killed_process_is_gone_on_with(tmp_path: Path, hf_folder: Folders) -> None:
    """SIGKILL, as from a batch system or for want of memory: nothing can be tidied up."""
    source = hf_folder("qwen2-moe")
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, source, tmp_path / "out"], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and times(tmp_path / "out.partial")
    hf_to_mcore(source, tmp_path / "out", Cut(2, 1, 2), report := Interrupting(-1))
    assert report.began[1] > 0
    hf_to_mcore(source, tmp_path / "again", Cut(2, 1, 2), NoReport())
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert_same_model(round_trip_back(tmp_path / "out", tmp_path), source)
