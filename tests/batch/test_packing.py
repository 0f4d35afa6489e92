"""Gradient steps and micro-batch plans: invariants on seeded cases, balance against a greedy baseline."""

from itertools import chain

import numpy as np
import pytest

from dapo_mcore.batch import packing
from dapo_mcore.batch.packing import (
    largest_differencing,
    micro_batch_ids,
    plan_micro_batches,
    split_mini_batches,
)
from dapo_mcore.errors import ConfigError


def test_split_by_hand():
    parts = split_mini_batches(np.array([0, 0, 1, 2, 2, 2, 3]), 2)
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5, 6]]


def test_split_follows_first_appearance_not_the_number():
    parts = split_mini_batches(np.array([9, 9, 1, 5]), 1)
    assert [part.tolist() for part in parts] == [[0, 1], [2], [3]]


def test_shuffle_keeps_groups_whole_and_is_repeatable():
    ids = np.repeat(np.arange(32), 4)
    parts = split_mini_batches(ids, 8, seed=3)
    assert len(parts) == 4
    assert sorted(np.concatenate(parts).tolist()) == list(range(128))
    assert all(len(part) == 32 and len(set(ids[part].tolist())) == 8 for part in parts)
    assert ids[parts[0]].tolist() != ids[split_mini_batches(ids, 8)[0]].tolist()
    assert all((a == b).all() for a, b in zip(parts, split_mini_batches(ids, 8, seed=3)))
    assert any((a != b).any() for a, b in zip(parts, split_mini_batches(ids, 8, seed=4)))


def test_indivisible_groups_are_refused_or_spread_evenly():
    ids = np.repeat(np.arange(9), 2)
    with pytest.raises(ConfigError, match=r"9 groups.*mini_batch_prompts 4: 1 would remain.*divisor of 9"):
        split_mini_batches(ids, 4)
    parts = split_mini_batches(ids, 4, allow_ragged=True)
    assert [len(part) // 2 for part in parts] == [3, 3, 3]
    assert sorted(np.concatenate(parts).tolist()) == list(range(18))


def test_fewer_groups_than_one_mini_batch_and_none_at_all():
    assert [p.tolist() for p in split_mini_batches(np.array([5, 5]), 4, allow_ragged=True)] == [[0, 1]]
    assert split_mini_batches(np.zeros(0, np.int64), 4) == []


def test_largest_differencing_on_the_textbook_example():
    # 8 7 6 5 4 in two parts: 8-7=1, 6-5=1, then 4-1=3, 3-1=2: sums 16 and 14
    costs = np.array([8, 7, 6, 5, 4])
    assert [costs[part].sum() for part in largest_differencing(costs, 2)] == [16, 14]


def greedy(costs, num_parts):
    """Return the largest sum of the greedy plan: the next largest item goes to the lightest part."""
    sums = np.zeros(num_parts)
    for cost in sorted(costs, reverse=True):
        sums[np.argmin(sums)] += cost
    return sums.max()


@pytest.mark.parametrize("num_parts", [2, 3, 8, 16])
@pytest.mark.parametrize("seed", range(10))
def test_never_worse_than_greedy(seed, num_parts):
    costs = np.random.default_rng(seed).lognormal(7, 1, size=256)
    parts = largest_differencing(costs, num_parts)
    assert sorted(chain(*parts)) == list(range(256))
    sums = [costs[part].sum() for part in parts]
    assert sums == sorted(sums, reverse=True)
    assert sums[0] <= greedy(costs, num_parts) * (1 + 1e-12)


@pytest.mark.parametrize("num_costs", [0, 1, 3])
def test_more_parts_than_items(num_costs):
    parts = largest_differencing(np.arange(1.0, num_costs + 1), 5)
    assert len(parts) == 5 and sorted(chain(*parts)) == list(range(num_costs))


def round_up(number, multiple):
    return -(-number // multiple) * multiple


def size_of(samples, lengths, context_parallel, align, packing):
    """Return the tokens that a micro-batch takes on all its context-parallel ranks."""
    zigzag = 2 * context_parallel if context_parallel > 1 else 1
    multiple = np.lcm(zigzag, context_parallel * align)
    if packing:
        return round_up(sum(round_up(lengths[i], zigzag) for i in samples), multiple)
    return len(samples) * round_up(max(lengths[i] for i in samples), multiple)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_plan_invariants(seed, packing):
    rng = np.random.default_rng(seed)
    data_parallel, context_parallel, align = rng.integers(1, 7), rng.choice([1, 2, 4]), rng.choice([1, 2, 3, 8])
    max_tokens, multiple = int(rng.integers(20, 200)), 1 + seed % 4
    lengths = rng.integers(1, max_tokens * context_parallel + 1, rng.integers(0, 80))

    def make_plan():
        return plan_micro_batches(
            lengths,
            data_parallel=int(data_parallel),
            context_parallel=int(context_parallel),
            max_tokens=max_tokens,
            align=int(align),
            packing=packing,
            multiple=multiple,
        )

    plan = make_plan()

    assert len(plan) == data_parallel and len({len(rank) for rank in plan}) == 1 and len(plan[0]) >= 1
    assert len(plan[0]) % multiple == 0
    flat = [sample for rank in plan for samples in rank for sample in samples]
    assert sorted(flat) == list(range(len(lengths)))
    zigzag = 2 * context_parallel if context_parallel > 1 else 1
    budget = round_up(max_tokens * context_parallel, np.lcm(zigzag, context_parallel * align))
    sizes = [size_of(m, lengths, context_parallel, align, packing) for rank in plan for m in rank if m]
    assert all(size <= budget for size in sizes)
    assert plan == make_plan()


def test_plan_by_hand_with_idle_ranks():
    # budget 10: lengths 6 and 5 do not fit together, 5 and 4 do; the third rank has nothing
    plan = plan_micro_batches(np.array([6, 5]), data_parallel=3, context_parallel=1, max_tokens=10)
    assert plan == [[[0]], [[1]], [[]]]
    plan = plan_micro_batches(np.array([6, 5, 4]), data_parallel=1, context_parallel=1, max_tokens=10)
    assert plan == [[[1, 2], [0]]]
    assert micro_batch_ids(plan, 3).tolist() == [1, 0, 0]


def test_the_number_of_micro_batches_is_a_multiple_by_hand():
    # three packs become four: of even cost if there are samples for it, else an empty one
    plan = plan_micro_batches(np.array([9, 5, 4, 3, 2]), data_parallel=1, context_parallel=1, max_tokens=10, multiple=2)
    assert plan == [[[0], [1], [3, 4], [2]]]
    plan = plan_micro_batches(np.array([9, 8, 7]), data_parallel=1, context_parallel=1, max_tokens=10, multiple=2)
    assert plan == [[[0], [1], [2], []]]
    plan = plan_micro_batches(
        np.array([3]), data_parallel=2, context_parallel=1, max_tokens=9, packing=False, multiple=3
    )
    assert plan == [[[0], [], []], [[], [], []]]


def test_budget_goes_before_balance():
    # differencing would give sums 16 and 14 (see the textbook example); 15 and 15 fill two packs exactly
    plan = plan_micro_batches(np.array([8, 7, 6, 5, 4]), data_parallel=1, context_parallel=1, max_tokens=15)
    assert sorted(plan[0]) == [[0, 1], [2, 3, 4]]


def test_micro_batch_count_is_near_the_lower_bound():
    lengths = np.random.default_rng(0).integers(100, 8000, 512)
    plan = plan_micro_batches(lengths, data_parallel=8, context_parallel=1, max_tokens=22528)
    assert len(plan[0]) <= np.ceil(lengths.sum() / 8 / 22528) + 1


def test_micro_batch_costs_are_even_within_and_across_ranks():
    lengths = np.clip(np.random.default_rng(0).lognormal(7.5, 0.7, 512), 50, 16000).astype(np.int64)
    plan = plan_micro_batches(lengths, data_parallel=4, context_parallel=1, max_tokens=32768)
    costs = np.array([[sum(lengths[i] * (1 + lengths[i] / 65536) for i in m) for m in rank] for rank in plan])
    assert costs.max() / costs.mean() < 1.05
    assert costs.sum(1).max() / costs.sum(1).mean() < 1.001
    assert (np.diff(costs, axis=1) <= 1e-6).all()


@pytest.mark.parametrize(
    ("crossover_tokens", "expected"),
    [
        (float("inf"), [{0, 1}, {2, 3, 4, 5}]),  # 4,000 tokens each
        (1e3, [{0}, {1, 2, 3, 4, 5}]),  # costs 3,000 · (1 + 3) = 12,000 against 5 · 1,000 · (1 + 1) = 10,000
    ],
)
def test_attention_counts_in_the_balance(crossover_tokens, expected):
    lengths = np.array([3000] + [1000] * 5)
    plan = plan_micro_batches(
        lengths, data_parallel=2, context_parallel=1, max_tokens=9000, crossover_tokens=crossover_tokens
    )
    ranks = [[int(lengths[i]) for micro_batch in rank for i in micro_batch] for rank in plan]
    assert sorted(ranks) == sorted([int(lengths[i]) for i in sorted(part)] for part in expected)


def test_sample_over_the_budget_is_refused_with_numbers():
    with pytest.raises(
        ConfigError, match=r"sample 1 has 41 tokens \(44 padded\).*20 \* context_parallel 2 = 40.*to 22"
    ):
        plan_micro_batches(np.array([3, 41]), data_parallel=1, context_parallel=2, max_tokens=20)


def test_a_sample_of_exactly_the_budget_always_fits():
    # 100 tokens padded to 104 for TP 8: refusing it would contradict the check at start-up
    assert plan_micro_batches(np.array([100]), data_parallel=1, context_parallel=1, max_tokens=100, align=8) == [[[0]]]


def test_a_large_step_is_balanced_over_many_ranks():
    lengths = np.clip(np.random.default_rng(0).lognormal(8, 1, 8192), 100, 20000).astype(np.int64)
    plan = plan_micro_batches(lengths, data_parallel=128, context_parallel=1, max_tokens=22528, align=8)
    totals = [sum(lengths[i] for m in rank for i in m) for rank in plan]
    assert max(totals) / np.mean(totals) < 1.05


def test_the_work_of_a_plan_grows_in_proportion_to_its_samples_and_all_packs_stay_even(monkeypatch):
    merge, handled = packing._merge, []

    def counted(wide, narrow, num_parts):
        handled[-1] += len(wide) + len(narrow)
        return merge(wide, narrow, num_parts)

    monkeypatch.setattr(packing, "_merge", counted)
    for num_samples in (1500, 3000):  # 3 fill a pack: 500 and 1,000 packs
        handled.append(0)
        lengths = np.random.default_rng(0).integers(90, 111, num_samples)
        ((*packs,),) = plan_micro_batches(lengths, data_parallel=1, context_parallel=1, max_tokens=340)
        sums = [lengths[pack].sum() for pack in packs]
        assert len(packs) == num_samples // 3 and max(sums) / np.mean(sums) < 1.04
        assert sorted(chain(*packs)) == list(range(num_samples))
    few, many = handled
    assert 2 * few * 0.9 < many < 2 * few * 1.1  # merging all packs at once would make it four times as many


def test_first_fit_takes_the_first_pack_with_room():
    luck = np.random.default_rng(0)
    for num_samples in (1, 2, 7, 64, 100):
        padded = luck.integers(1, 11, num_samples)
        free, expected = [10] * num_samples, [[] for _ in range(num_samples)]
        for sample in sorted(range(num_samples), key=lambda sample: -padded[sample]):
            place = next(place for place, room in enumerate(free) if room >= padded[sample])
            expected[place].append(sample)
            free[place] -= padded[sample]
        assert packing._first_fit(range(num_samples), padded, 10) == [part for part in expected if part]
