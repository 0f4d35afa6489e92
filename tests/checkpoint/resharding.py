"""Save on one mesh and load on others: each rank must hold, bit for bit, what was saved.

Workers of test_resharding.py; they run in real gloo processes, one start for many meshes. The expected tensors are gathered
without a checkpoint: weights by the stream of the weight sync, Adam's moments and fp32 copies through the data-parallel
buckets of the gradients. Also run as a program, under another version of megatron-core:

    python -m tests.checkpoint.resharding FOLDER '[["tied", {"tensor": 2}, {}], …]'
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.actor import parity
from tests.actor.parity import Mesh

SIZES = dict(
    vocab_size=65,  # padded: to 72 on one tensor-parallel rank, to 80 on two, to 72 on three
    hidden_size=48,
    intermediate_size=60,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=6,
    max_position_embeddings=64,
)
EXPERTS = dict(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=18,
    shared_expert_intermediate_size=18,
    mlp_only_layers=[1],
    num_hidden_layers=4,
)
MODELS = {
    "tied": ("Qwen2", "fp32", {"tie_word_embeddings": True}),
    "tied bf16": ("Qwen2", "bf16", {"tie_word_embeddings": True}),
    "untied bf16": ("Qwen2", "bf16", {"tie_word_embeddings": False}),
    "experts": ("Qwen2Moe", "fp32", EXPERTS),
}


@dataclass(frozen=True)
class Case:
    """A model on a mesh. It saves, then loads its own checkpoint and those of earlier cases with the same model.

    distributed   the distributed optimizer, else the plain one
    bucket_size   that of the section `parallel`, with overlap_grad_reduce; None for one bucket
    """

    model: str
    mesh: Mesh
    distributed: bool = True
    bucket_size: int | None = None

    def __str__(self) -> str:
        kind = "" if self.distributed else " plain"
        return f"{self.model} {self.mesh}{kind}{' buckets' if self.bucket_size else ''}"


def run(cases: Sequence[Case], folder: Path) -> dict[str, list[str]]:
    """Return {"saved by → loaded by": names of tensors that differ}. Goes on with the checkpoints that `folder` has."""
    multiprocessing.set_forkserver_preload([f"{parity.__package__}.preload"])
    for case in cases:
        (folder / case.model).mkdir(parents=True, exist_ok=True)
    num_ranks = max(case.mesh.world_size for case in cases)
    stores = tempfile.mkdtemp(prefix="stores_", dir=folder)  # one per call: a used store would hang the next group
    mp.start_processes(_enter, (list(cases), folder, stores), nprocs=num_ranks, start_method="forkserver")
    return json.loads((folder / "found.json").read_text())


def _enter(rank: int, cases: list[Case], folder: Path, stores: str) -> None:
    from dapo_mcore.actor.parallel import layout as layouts

    os.environ.update(LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    found: dict[str, list[str]] = {}
    for number, case in enumerate(cases):
        size = case.mesh.world_size
        if rank < size:
            store = f"file://{stores}/{number}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            layout = layouts.start(_config(case).parallel, seed=0)
            found |= save_and_load_all(layout, case, folder / case.model)
            layouts.stop()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def save_and_load_all(layout: Any, case: Case, folder: Path) -> dict[str, list[str]]:
    """Worker: return the tensors that differ for each pair of meshes, over all ranks."""
    from dapo_mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint

    torch.manual_seed(zlib.crc32(str(case).encode()))
    actor, earlier = _actor(case, layout), sorted(folder.glob("*/checkpoints"))
    for update in range(2):
        _step(actor, update)
    expected, copies = gathered(actor), local(actor)
    if layout.is_controller:
        (folder / str(case)).mkdir()
        torch.save(expected, folder / str(case) / "expected.pt")
    state = _train_state(actor.num_updates) if layout.is_controller else None
    own = save_checkpoint(folder / str(case), actor, state, layout, keep=1)
    found = {}
    for path in [*(path / own.name for path in earlier), own]:
        _spoil(actor)
        load_checkpoint(path, actor, layout)
        wrong = _different(gathered(actor), path.parents[1] / "expected.pt", layout)
        if path == own:
            wrong += [f"local {name}" for name, value in local(actor).items() if not torch.equal(value, copies[name])]
        told: list[Any] = [None] * layout.world_size
        dist.all_gather_object(told, wrong + _torn(actor), group=layout.control_group)
        found[f"{path.parents[1].name} → {case}"] = [
            f"rank {r}: {name}" for r, names in enumerate(told) for name in names
        ]
    return found


def gathered(actor: Any) -> dict[str, torch.Tensor]:
    """Return full tensors by kind and HF name, on rank 0: weights, fp32 copies, both moments, and Adam's steps."""
    kinds = {"weight": {name: p.detach() for name, p in actor.policy.named_weights()}, **optimizer_state(actor)}
    found = {}
    for kind, tensors in kinds.items():
        halves = [_in_dtype(tensor, actor.policy.config.params_dtype) for tensor in tensors.values()]
        for number, half in enumerate(zip(*halves, strict=True)):
            whole = parity.gather_named(actor, dict(zip(tensors, half, strict=True)))
            found |= {f"{kind} {number} {name}": tensor for name, tensor in whole.items()}
    return found | {"steps": torch.tensor([actor.optimizer.adam_step, actor.num_updates])}


def _in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the tensor, or both halves of its fp32 bits if the stream of weights is bf16."""
    if tensor.dtype == dtype:
        return [tensor]
    return [half.contiguous() for half in tensor.contiguous().view(dtype).unflatten(-1, (-1, 2)).unbind(-1)]


def optimizer_state(actor: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return {kind: {name: whole local tensor}}, summed over data-parallel ranks in a buffer of the gradients' shape."""
    parts = actor.optimizer.megatron.chained_optimizers
    state = {main: values for part in parts for main, values in part.optimizer.state.items()}
    kinds = ("exp_avg", "exp_avg_sq", *(["param"] if actor.config.model.dtype == "bf16" else []))
    if not actor.config.optimizer.distributed:
        mains = {name: getattr(p, "main_param", p) for name, p in actor.policy.named_weights()}
        return {kind: {n: m if kind == "param" else state[m][kind] for n, m in mains.items()} for kind in kinds}
    names = {p: name for name, p in actor.policy.named_weights()}
    whole: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}
    for buffer in parity.buffers(actor):
        for kind in kinds:
            flat = torch.zeros(buffer.grad_data.numel())
            for part in parts:
                for p, (group, place) in part.model_param_group_index_map.items():
                    if p in buffer.param_index_map:
                        main = part.optimizer.param_groups[group]["params"][place]
                        where = part._get_model_param_range_map(p)["gbuf_world"]
                        flat[where.start : where.end] = main if kind == "param" else state[main][kind]
            dist.all_reduce(flat, group=buffer.data_parallel_group)
            for p, (start, stop, _) in buffer.param_index_map.items():
                whole[kind][names[p]] = flat[start:stop].view(p.shape)
    return whole


def local(actor: Any) -> dict[str, torch.Tensor]:
    """Return copies of this rank's tensors, including both copies of a tied embedding, of which only one is gathered."""
    found = {name: p.detach() for name, p in actor.policy.named_weights()}
    found |= {f"state {number}": tensor.detach() for number, tensor in enumerate(actor.optimizer.tensors())}
    return {name: tensor.clone() for name, tensor in found.items()}


def _torn(actor: Any) -> list[str]:
    """Return ["tied embedding"] if its copies on the first and on the last stage differ, else []."""
    layout = actor.layout
    if not actor.shape.tied or layout.pipeline == 1:
        return []
    kinds = {"weight": dict(actor.policy.named_weights()), **optimizer_state(actor)}
    mine = [
        kind[name]
        for kind in kinds.values()
        for name in ("embedding.word_embeddings.weight", "output_layer.weight")
        if name in kind
    ]
    digest = [zlib.crc32(tensor.detach().float().numpy().tobytes()) for tensor in mine]
    everyone: list[Any] = [None] * layout.pipeline
    dist.all_gather_object(everyone, digest, group=layout.pipeline_group)
    return [] if everyone[0] and everyone[0] == everyone[-1] else ["tied embedding"]


def _different(found: dict[str, torch.Tensor], expected_path: Path, layout: Any) -> list[str]:
    if not layout.is_controller:
        return []
    expected = torch.load(expected_path)
    assert expected.keys() == found.keys() and any(name.startswith("exp_avg_sq") for name in found)
    return [name for name in expected if not _same_bits(expected[name], found[name])]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _step(actor: Any, update: int) -> None:
    """Take an update with made-up gradients, equal on all copies of a parameter, and without a forward pass."""
    layout = actor.layout
    tied = {"output_layer.weight": "embedding.word_embeddings.weight"} if actor.shape.tied else {}
    for name, parameter in actor.policy.named_weights():
        whole = tied.get(name, name)
        split = getattr(parameter, "tensor_model_parallel", False)
        rank = layout.expert_tensor_rank if ".experts." in name else layout.tensor_rank if split else 0
        noise = torch.Generator().manual_seed(zlib.crc32(f"{whole} {rank} {update}".encode()))
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=noise))
    from dapo_mcore.actor.update_guard import Verdict

    norm = actor.optimizer.prepare()
    actor.optimizer.step(norm)
    actor.guard.add(Verdict.TAKEN, norm)


def _spoil(actor: Any) -> None:
    """Fill all tensors with NaN, so that a load must replace every element."""
    with torch.no_grad():
        for _, weight in actor.policy.named_weights():
            weight.fill_(torch.nan)
        for tensor in actor.optimizer.tensors():
            tensor.fill_(torch.nan)


def _actor(case: Case, layout: Any) -> Any:
    import transformers

    from dapo_mcore.actor.actor import Actor
    from dapo_mcore.model_files.hf_folder import RandomReader

    kind, _, own = MODELS[case.model]
    model = getattr(transformers, f"{kind}Config")(**SIZES | own, architectures=[f"{kind}ForCausalLM"])
    reader = RandomReader(model, seed=zlib.crc32(str(case).encode()))
    actor = Actor(_config(case), model, layout, reader)
    first = actor.ddp[0]
    if case.bucket_size:  # upstream cuts the first stage alone
        assert len(first.buffers[0].buckets) > 2 or not first.module.pre_process
    return actor


def _config(case: Case) -> Any:
    dtype = MODELS[case.model][1]
    overlap = {"parallel__overlap_grad_reduce": True, "parallel__bucket_size": case.bucket_size}
    return parity.make_config(
        case.mesh,
        model__dtype=dtype,
        optimizer__distributed=case.distributed,
        **overlap if case.bucket_size else {},
    )


def _train_state(num_updates: int) -> Any:
    from dapo_mcore.checkpoint.run_state import TrainState

    return TrainState(1, num_updates, 1, loader={}, sampler={}, sampler_arrays={}, config="")


def as_json(cases: Sequence[Case]) -> str:
    return json.dumps([asdict(case) for case in cases])


if __name__ == "__main__":
    plan = [Case(**entry | {"mesh": Mesh(**entry["mesh"])}) for entry in json.loads(sys.argv[2])]
    found = run(plan, Path(sys.argv[1]))
    print(json.dumps({"version": version("megatron-core"), "found": found}))
