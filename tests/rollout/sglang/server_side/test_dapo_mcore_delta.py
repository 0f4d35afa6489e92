"""Changed values applied by loaders like SGLang's: tensor-parallel slices, fused and padded parameters, exact bits, and what is
refused. The real loaders are in test_real_resume.py."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from dapo_mcore.rollout.sglang.server_side.dapo_mcore_delta import (
    MARK,
    Changed,
    Entry,
    bits,
    decoded,
    expanded,
    load,
)
from dapo_mcore.rollout.sglang.sync.delta import Packing, encode

HEADS, HEAD_DIM, KV_HEADS, HIDDEN, INNER, VOCAB, RANKS = 9, 4, 3, 36, 33, 50, 3
SHAPES = {
    "embed.weight": (VOCAB, HIDDEN),
    "q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "q_proj.bias": (HEADS * HEAD_DIM,),
    "o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    "gate_proj.weight": (INNER, HIDDEN),
    "up_proj.weight": (INNER, HIDDEN),
    "down_proj.weight": (HIDDEN, INNER),
    "norm.weight": (HIDDEN,),
    "router.weight": (8, HIDDEN),
}


class Rank:
    """One of three tensor-parallel ranks, which narrows and copies like SGLang's linear, QKV and vocabulary layers.

    The embedding is padded to 51 rows, and tied: the head is the same parameter, loaded by the same tensor a second time.
    Experts of SGLang's Triton kernels hold `up` transposed.
    """

    def __init__(self, rank: int, dtype: torch.dtype):
        self.rank = rank
        share = {"q": HEADS * HEAD_DIM // RANKS, "k": KV_HEADS * HEAD_DIM // RANKS, "gate": INNER // RANKS}
        q, k, inner = share.values()
        sizes = {
            "embed": ((VOCAB + 1) // RANKS, HIDDEN),
            "qkv": (q + 2 * k, HIDDEN),
            "qkv_bias": (q,),
            "o": (HIDDEN, q),
            "gate": (inner, HIDDEN),
            "up_transposed": (1, HIDDEN, inner),
            "down": (HIDDEN, inner),
            "norm": (HIDDEN,),
        }
        self.parameters = {name: torch.nn.Parameter(torch.randn(size).to(dtype), False) for name, size in sizes.items()}
        self.parameters["router"] = torch.nn.Parameter(torch.randn(8, HIDDEN), False)  # fp32 in every model
        self.fused = {"q": (0, q), "k": (q, k), "v": (q + k, k)}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, loaded in weights:
            getattr(self, f"_load_{name.split('.')[0]}")(loaded, name)

    def _rows(self, target: Tensor, loaded: Tensor) -> None:
        target.copy_(loaded.narrow(0, self.rank * target.shape[0], target.shape[0]))

    def _load_embed(self, loaded: Tensor, name: str) -> None:
        parameter = self.parameters["embed"]
        start = self.rank * parameter.shape[0]
        count = min(parameter.shape[0], VOCAB - start)
        for _ in range(2):
            shard = loaded.narrow(0, start, count)
            parameter[: shard.shape[0]].data.copy_(shard)
            parameter[shard.shape[0] :].data.fill_(0)

    def _load_q_proj(self, loaded: Tensor, name: str) -> None:
        target = self.parameters["qkv_bias" if name.endswith("bias") else "qkv"].data
        self._rows(target.narrow(0, *self.fused[name[0]]), loaded)

    _load_k_proj = _load_v_proj = _load_q_proj

    def _load_gate_proj(self, loaded: Tensor, name: str) -> None:
        self._rows(self.parameters["gate"].data, loaded)

    def _load_up_proj(self, loaded: Tensor, name: str) -> None:
        width = INNER // RANKS
        moved = loaded.transpose(-2, -1).narrow(1, self.rank * width, width).contiguous().to("cpu")
        self.parameters["up_transposed"].data[0].copy_(moved)

    def _load_columns(self, loaded: Tensor, name: str) -> None:
        target = self.parameters[name.split("_")[0]].data
        target.copy_(loaded.narrow(1, self.rank * target.shape[1], target.shape[1]))

    _load_o_proj = _load_down_proj = _load_columns

    def _load_norm(self, loaded: Tensor, name: str) -> None:
        self.parameters[name.split(".")[0]].data.copy_(loaded)

    _load_router = _load_norm


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.randn(shape).to(torch.float32 if "router" in name else dtype) for name, shape in SHAPES.items()}


def changed(old: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return the weights with that share of values changed, sometimes to -0.0 or a NaN, or from one NaN to another."""
    new = {}
    for name, tensor in old.items():
        where = torch.rand(tensor.shape) < share
        values = torch.randn(tensor.shape).to(tensor.dtype)
        odd = bits(torch.tensor([-0.0, float("nan"), 0.0], dtype=tensor.dtype))
        odd[1] += int(torch.randint(8, ()))  # the payload of a NaN
        place = torch.randint(12, tensor.shape)
        values = torch.where(place < 3, odd[place.clamp(max=2)].view(tensor.dtype), values)
        new[name] = torch.where(where, values, tensor)
    return new


def bucket(old: dict[str, Tensor], new: dict[str, Tensor]) -> tuple[str, Tensor]:
    packing = Packing()
    for name, tensor in new.items():
        packing.add(*encode(name, tensor, old.get(name))[:2])
    return packing.bucket()


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_twenty_updates_by_changes_leave_the_bits_of_whole_syncs_on_every_rank(dtype):
    torch.manual_seed(0)
    ranks, twins = [[Rank(rank, dtype) for rank in range(RANKS)] for _ in range(2)]
    now = weights(dtype)
    for model in ranks:
        model.load_weights(now.items())
        load(model, [])
        load(model, [])  # a second time changes nothing
    num_sparse = 0
    for share in [0.01, 0.03, 0, 1, 0.1] * 4:
        before, now = now, changed(now, share)
        sent = bucket(before, now)
        num_sparse += sent[0].count("null") < len(SHAPES)
        for model, twin in zip(ranks, twins):
            model.load_weights([(sent[0], sent[1].clone())])
            twin.load_weights(now.items())
            assert all(equal(value, twin.parameters[name]) for name, value in model.parameters.items())
    assert num_sparse == 16, "all but the updates that change everything"


def test_the_bytes_of_an_entry_by_hand():
    """[20, 8] in bf16: bits 1 everywhere; two values of row 1 change to bits 7 and 8, and one of row 19 to bits 9."""
    old = torch.ones(20, 8, dtype=torch.int16)
    new = old.clone()
    new[1, 0], new[1, 3], new[19, 2] = 7, 8, 9
    entry, pieces, count = encode("w", new.view(torch.bfloat16), old.view(torch.bfloat16))
    assert (count, entry.num_changed, entry.num_bytes) == (3, 3, 4 * (20 + 8 + 20) + 3 * (2 + 2))
    packing = Packing()
    packing.add(entry, pieces)
    packing.add(entry, pieces)
    name, flat = packing.bucket()
    assert name == MARK + '[["w", [20, 8], "bfloat16", 0, 3], ["w", [20, 8], "bfloat16", 208, 3]]'
    row_sums, counts = [8] * 20, [0] * 20
    row_sums[1], row_sums[19], counts[1], counts[19] = 7 + 6 + 8, 7 + 9, 2, 1
    sums = np.array([*row_sums, 26, 20, 28, 27, 20, 20, 20, 20, *counts], np.int32).tobytes()
    assert flat[:204].numpy().tobytes() == sums + np.array([7, 8, 9, 0, 3, 2], np.uint16).tobytes()
    assert torch.equal(flat[:204], flat[208:412])


def test_whole_tensors_travel_where_changes_would_take_more_bytes():
    """[100, 100] in bf16: 1,200 B of sums and counts + 4 B a change, against 20,000 B: even at 4,700 changes."""
    old = torch.zeros(100, 100, dtype=torch.bfloat16)
    for num_changed, is_sparse in {0: True, 4699: True, 4700: False, 10000: False}.items():
        new = old.clone()
        new.view(-1)[:num_changed] = 1.0
        entry, _, count = encode("w", new, old)
        assert (entry.num_changed is not None) == is_sparse and count == num_changed
    assert encode("w", old, None)[0].num_changed is None
    assert encode("norm", old[0], old[0])[0].num_changed is None


def test_the_last_of_65536_columns_is_written():
    old = torch.zeros(3, 2**16, dtype=torch.bfloat16)
    new = old.clone()
    new[2, -1] = new[0, 2**15] = 5.0
    held = {"w": torch.zeros_like(old)}
    (pair,) = expanded([bucket({"w": old}, {"w": new})], [])
    assert isinstance(pair[1], Changed)
    held["w"].copy_(pair[1])
    assert torch.equal(held["w"], new)
    assert encode("w", torch.zeros(3, 2**16 + 1), torch.zeros(3, 2**16 + 1))[0].num_changed is None


@pytest.mark.parametrize("where", ["unchanged value", "base of another version"])
def test_a_server_that_does_not_hold_the_base_says_so(where):
    torch.manual_seed(1)
    base = weights(torch.bfloat16)
    held = changed(base, 0.01) if where == "base of another version" else {n: t.clone() for n, t in base.items()}
    model = Rank(1, torch.bfloat16)
    model.load_weights(held.items())
    load(model, [])
    if where == "unchanged value":
        bits(model.parameters["down"].data)[3, 4] += 1
        match = r"1 of \d+ parameters do not hold .*: down_proj.weight\[0:, 11:\]; the server needs a whole copy"
    else:
        match = r"parameters do not hold the trainer's weights after the changes"
    new = {name: tensor.clone() for name, tensor in base.items()}
    new["down_proj.weight"][30, 1] = 3.0
    with pytest.raises(ValueError, match=match):
        model.load_weights([bucket(base, new)])


def placeholder(dtype: torch.dtype = torch.bfloat16) -> Changed:
    old = torch.zeros(30, 40, dtype=dtype)
    new = old.clone()
    new[1, 2] = 1.0
    name, flat = bucket({"w": old}, {"w": new})
    (pair,) = expanded([(name, flat)], [])
    return pair[1]


@pytest.mark.parametrize(
    "use",
    [
        lambda target, weight: target.copy_(weight * 2),
        lambda target, weight: target.copy_(torch.cat([weight, weight])[:30]),
        lambda target, weight: target.add_(weight),
        lambda target, weight: target.__setitem__(slice(None), weight),
        lambda target, weight: target.copy_(weight.float()),
        lambda target, weight: target.float().copy_(weight),
        lambda target, weight: target.copy_(weight.view(40, 30).t()),
        lambda target, weight: target[:10, :10].copy_(weight[:10, :10]),
        lambda target, weight: target[:10].copy_(weight),
    ],
)
def test_a_loader_that_computes_with_a_weight_is_refused(use):
    target = torch.zeros(30, 40, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"set rollout\.sglang\.delta false"):
        use(target, placeholder())
    assert target.eq(0).sum() >= 30 * 40 - 1, "nothing but changed values was written"


def test_what_a_loader_asks_of_a_weight_is_answered():
    weight = placeholder()
    assert (weight.shape, weight.dim(), weight.dtype) == ((30, 40), 2, torch.bfloat16)
    assert weight.narrow(0, 10, 5).size(0) == 5 and weight.numel() == 1200


def test_entries_survive_json():
    entry = Entry("a.b", (3, 4), torch.float32, 64, 5)
    assert Entry.from_json(entry.to_json()) == entry
    assert decoded(Entry("n", (2,), torch.float32, 8, None), torch.arange(16, dtype=torch.uint8), []).shape == (2,)
