"""The policy head with its vocabulary split over 1, 2 and 4 ranks (gloo): equal results for every split.

Triton on several ranks is compared with PyTorch on one rank. If there is a GPU, the ranks share it.
"""

from __future__ import annotations

import multiprocessing
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dapo_mcore.kernels.policy_head import chunks, linear_logprobs
from dapo_mcore.kernels.policy_loss.shard import VocabShard

from tests.kernels.keywords import linear_policy_loss
from tests.kernels.triton_here import DEVICE, IMPLEMENTATIONS

WORLD = 4
TOKENS, WIDTH = 10, 12
# rows of the whole matrix with padding, size of the vocabulary; in the second case the last of 4 ranks has only padding
VOCABULARIES = [(32, None), (16, 11)]
KINDS = [("torch", torch.float64), ("torch", torch.float32)]
if "triton" in IMPLEMENTATIONS:  # on a CPU in the interpreter: the ranks' processes inherit TRITON_INTERPRET
    KINDS.append(("triton", torch.float32))
OPTIONS = {"dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.02, "temperature": 0.7, "chunk_tokens": 6}


def problem(rows: int, vocab_size: int | None, dtype: torch.dtype, tokens: int = TOKENS):
    g = torch.Generator().manual_seed(7)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    hidden, weight = normal(tokens, WIDTH), normal(rows, WIDTH) / 2
    targets = torch.randint(0, vocab_size or rows, (tokens,), generator=g)
    everywhere = ((hidden @ weight.t())[:, :vocab_size] / OPTIONS["temperature"]).log_softmax(-1)
    logprobs = everywhere.gather(1, targets[:, None])[:, 0]
    inputs = {
        "advantages": normal(tokens),
        "token_weights": normal(tokens).abs() / max(tokens, 1),
        "old_logprobs": logprobs + 0.3 * normal(tokens),
        "ref_logprobs": logprobs + 0.3 * normal(tokens),
        "tis_weights": normal(tokens).exp(),
    }
    return hidden, weight, targets, inputs


def run(rows, vocab_size, implementation, dtype, group=None, tokens=TOKENS):
    """Return the output, this rank's gradients, the gradient to hidden summed over ranks, and the scored log-probs."""
    device = DEVICE if implementation == "triton" else "cpu"
    hidden, weight, targets, inputs = problem(rows, vocab_size, dtype, tokens)
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    hidden, local = (x.to(device).requires_grad_() for x in (hidden, weight.chunk(size)[rank].clone()))
    targets, inputs = targets.to(device), {name: value.to(device) for name, value in inputs.items()}
    how = {"vocab_size": vocab_size, "tp_group": group, "implementation": implementation}

    def gradients(**modes):
        out = linear_policy_loss(hidden, local, targets, **modes, **how, **inputs, **OPTIONS)
        return out, torch.autograd.grad(out.loss, (hidden, local))

    out, (grad_hidden, grad_weight) = gradients()
    modes = [{}, {}] if implementation == "torch" else []  # the interpreter is slow
    modes += [{"main_grad": torch.zeros_like(local, dtype=torch.promote_types(dtype, torch.float32))}]
    reduced = [gradients(reduce_hidden_grad=True, **mode)[1][0].cpu() for mode in modes]
    scoring = {name: OPTIONS[name] for name in ("temperature", "chunk_tokens")}
    scored, _ = linear_logprobs(hidden, local, targets, **how, **scoring)
    return {
        "fields": [field.detach().cpu() for field in out],
        "hidden": grad_hidden.cpu(),
        "reduced": reduced,
        "weight": grad_weight.cpu(),
        "scored": scored.cpu(),
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(minutes=2), world_size=WORLD, rank=rank)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    results = {
        (size, case, kind): run(*case, *kind, group)
        for size, group in groups.items()
        for case in VOCABULARIES
        for kind in KINDS
    }
    for size, group in groups.items():
        results[size, "bf16"] = run(32, None, "torch", torch.bfloat16, group)
    if rank == 0:  # one rank alone: a collective would wait for the others and fail
        results["empty"] = run(32, None, *KINDS[-1], dist.group.WORLD, tokens=0)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tensor_parallel"))
    multiprocessing.set_forkserver_preload([__name__])  # imports torch once instead of once per rank
    method = "forkserver" if DEVICE == "cpu" else "spawn"  # CUDA does not outlive a fork
    mp.start_processes(worker, (folder,), nprocs=WORLD, start_method=method)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("case", VOCABULARIES, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_any_split_gives_the_numbers_of_one_rank(results, size, case, kind):
    ranks = [result[size, case, kind] for result in results[:size]]
    whole = run(*case, "torch", kind[1])
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if kind[1] == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}
    for rank in ranks:
        for ours, expected in zip(rank["fields"], whole["fields"]):
            torch.testing.assert_close(ours, expected, **tolerance)
        assert torch.equal(rank["scored"], rank["fields"][1])
    torch.testing.assert_close(sum(rank["hidden"] for rank in ranks), whole["hidden"], **tolerance)
    torch.testing.assert_close(torch.cat([rank["weight"] for rank in ranks]), whole["weight"], **tolerance)
    assert whole["weight"].abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_hold_the_same_bits(results, size, kind):
    first, *others = (result[size, VOCABULARIES[1], kind]["fields"] for result in results[:size])
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.parametrize("size", [2, 4])
def test_the_hidden_gradient_summed_in_the_head_is_the_sum_over_ranks(results, size):
    """A sum of two numbers is rounded once, so two ranks give equal bits; four may add in another order."""
    cases = [(size, case, kind) for case in VOCABULARIES for kind in KINDS] + [(size, "bf16")]
    for case in cases:
        ranks = [result[case] for result in results[:size]]
        added = sum(rank["hidden"] for rank in ranks[1:]) + ranks[0]["hidden"]
        for rank in ranks:
            for reduced in rank["reduced"]:
                assert torch.equal(reduced, ranks[0]["reduced"][0]), "equal bits every time and on every rank"
                if size == 2:
                    assert torch.equal(reduced, added)
                tolerance = {"rtol": 2e-2, "atol": 1e-3} if case[-1] == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
                torch.testing.assert_close(reduced, added, **tolerance)
        assert not torch.equal(added, ranks[0]["hidden"])


def test_one_rank_needs_no_sum():
    alone = run(*VOCABULARIES[1], *KINDS[0])
    assert all(torch.equal(reduced, alone["hidden"]) for reduced in alone["reduced"])


def test_the_sum_of_a_chunk_starts_before_its_weight_gradient_and_is_awaited_at_the_end(monkeypatch):
    seen = []

    class Started:
        def wait(self):
            seen.append("awaited")

    def start_sum(shard, partial):
        seen.append(f"sum of {len(partial)}")
        return Started()

    def add_product(total, a, b, factor):
        seen.append(f"product of {len(b)}")

    monkeypatch.setattr(VocabShard, "start_sum", start_sum)
    monkeypatch.setattr(chunks, "add_product", add_product)
    hidden, weight, targets, inputs = problem(32, None, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    eager = {"main_grad": torch.zeros(weight.shape)}
    linear_policy_loss(hidden, weight, targets, reduce_hidden_grad=True, **inputs, **OPTIONS, **eager)
    assert seen == ["sum of 6", "product of 6", "sum of 4", "product of 4", "awaited", "awaited"]
    with torch.no_grad():
        linear_policy_loss(hidden, weight, targets, reduce_hidden_grad=True, **inputs, **OPTIONS)
    assert len(seen) == 6


def test_no_tokens_need_no_collective_and_give_zero_gradients(results):
    empty = results[0]["empty"]
    assert empty["fields"][0] == 0 and empty["hidden"].shape == (0, WIDTH)
    assert all(reduced.shape == (0, WIDTH) for reduced in empty["reduced"])
    assert empty["weight"].shape == (8, WIDTH) and empty["weight"].eq(0).all()
