"""Division of samples into gradient steps, data-parallel ranks and micro-batches.

Change here: how work is divided. Speed and memory depend on it, the gradient does not (algo/loss.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import count
from operator import itemgetter

import numpy as np

from dapo_mcore.batch.context import pack_multiple, padded_length, round_up
from dapo_mcore.errors import ConfigError

Plan = list[list[list[int]]]
"""Sample indices by [data-parallel rank][micro-batch]."""

CROSSOVER_TOKENS = 65_536.0
"""Sequence length at which causal attention costs as much as all matrix products of a layer: about 12 times the hidden
size (2·H·len against 24·H² operations per token), 61k for Qwen2.5-32B."""

_BLOCK_PARTS = 128
"""Most parts that are balanced together: the work of `largest_differencing` is the number of samples times this."""


def split_mini_batches(
    group_ids: np.ndarray, mini_batch_prompts: int, seed: int | None = None, *, allow_ragged: bool = False
) -> list[np.ndarray]:
    """Return int64 arrays, the sample indices of each gradient step. Each sample occurs once, and groups stay whole.

    group_ids           int64 [B], equal numbers are one group.
    mini_batch_prompts  groups per gradient step.
    seed                shuffles whole groups; None keeps their order of appearance.
    allow_ragged        for a step with too few groups: ceil(groups / mini_batch_prompts) gradient steps whose numbers
                        of groups differ by at most one, so that the last one is not nearly empty.
    Raise ConfigError if mini_batch_prompts does not divide the number of groups and allow_ragged is False.
    """
    _, first, group = np.unique(group_ids, return_index=True, return_inverse=True)
    num_groups = len(first)
    if num_groups % mini_batch_prompts and not allow_ragged:
        raise ConfigError(
            f"{num_groups} groups of this rollout step cannot be cut into gradient steps of batch.mini_batch_prompts "
            f"{mini_batch_prompts}: {num_groups % mini_batch_prompts} would remain; use a divisor of {num_groups}"
        )
    order = np.argsort(first) if seed is None else np.random.default_rng(seed).permutation(np.argsort(first))
    by_group = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    steps = np.array_split(order, -(-num_groups // mini_batch_prompts)) if num_groups else []
    return [np.concatenate([by_group[number] for number in step]).astype(np.int64) for step in steps]


def plan_micro_batches(
    lengths: np.ndarray,
    *,
    data_parallel: int,
    context_parallel: int,
    max_tokens: int,
    align: int = 1,
    packing: bool = True,
    multiple: int = 1,
    crossover_tokens: float = CROSSOVER_TOKENS,
) -> Plan:
    """Return the sample indices of one mini-batch by [data-parallel rank][micro-batch]; each index occurs once.

    lengths           int64 [n], tokens of each sample, prompt and response.
    max_tokens        tokens of a micro-batch on one context-parallel rank, rounded up to an aligned share, so that a
                      sample of max_tokens · CP tokens fits. With packing padded lengths count, otherwise rectangles.
    align             divides a rank's number of tokens (tensor_multiple of `build_micro_batch`).
    multiple          divides the number of micro-batches of a rank.
    crossover_tokens  a sample costs len · (1 + len / crossover_tokens), in proportion to its FLOPs.

    First ranks are balanced by cost, then each rank's micro-batches. All ranks get the same number of micro-batches, the
    most expensive first, so that those that run at the same time are alike; some may be empty (`build_micro_batch`).
    Deterministic: every rank computes the same plan. Raise ConfigError for a sample that exceeds the budget.
    """
    padded = padded_length(np.asarray(lengths, dtype=np.int64), context_parallel)
    tokens_multiple = pack_multiple(context_parallel, align)
    budget = round_up(max_tokens * context_parallel, tokens_multiple)
    _check_budget(lengths, padded, budget, max_tokens, context_parallel)
    costs = padded * (1.0 + padded / crossover_tokens)

    ranks = largest_differencing(costs, data_parallel)
    fitted = [
        _first_fit(rank, padded, budget) if packing else _rectangles(rank, padded, budget, tokens_multiple)
        for rank in ranks
    ]
    num_micro_batches = int(round_up(max(1, *map(len, fitted)), multiple))
    if packing:
        fitted = [_balanced(parts, padded, costs, budget, num_micro_batches) for parts in fitted]
    return [_in_order(parts, costs, num_micro_batches) for parts in fitted]


def micro_batch_ids(plan: Plan, num_samples: int) -> np.ndarray:
    """Return int64 [num_samples], the number of each sample's micro-batch, unique over data-parallel ranks."""
    ids = np.zeros(num_samples, dtype=np.int64)
    for number, samples in enumerate(samples for rank in plan for samples in rank):
        ids[samples] = number
    return ids


def largest_differencing(costs: np.ndarray, num_parts: int) -> list[list[int]]:
    """Return the indices of `costs` in `num_parts` lists of nearly equal sums, largest sum first; lists may be empty.

    Source: Karmarkar and Karp, "The Differencing Method of Set Partitioning" (1982). Each step merges the two partial
    partitions with the largest spread: the largest part of one joins the smallest of the other. O(n · parts).
    """
    heap = [(-cost, i, [(cost, i)]) for i, cost in enumerate(np.asarray(costs, dtype=np.float64).tolist())]
    heapq.heapify(heap)
    number = count(len(heap))  # breaks ties, so that trees are never compared
    while len(heap) > 1:
        wide, narrow = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        parts = _merge(wide, narrow, num_parts)
        smallest = parts[-1][0] if len(parts) == num_parts else 0.0
        heapq.heappush(heap, (smallest - parts[0][0], next(number), parts))
    filled = [_leaves(tree) for _, tree in heap[0][2]] if heap else []
    return filled + [[] for _ in range(num_parts - len(filled))]


def _check_budget(lengths: np.ndarray, padded: np.ndarray, budget: int, max_tokens: int, context_parallel: int) -> None:
    if not len(padded) or padded.max() <= budget:
        return
    worst = int(np.argmax(padded))
    raise ConfigError(
        f"sample {worst} has {lengths[worst]} tokens ({padded[worst]} padded), but a micro-batch holds batch.max_tokens "
        f"{max_tokens} * context_parallel {context_parallel} = {max_tokens * context_parallel}; raise batch.max_tokens "
        f"to {-(-int(padded[worst]) // context_parallel)}, or shorten prompts or responses"
    )


def _merge(wide: list[tuple], narrow: list[tuple], num_parts: int) -> list[tuple]:
    """Return the parts (sum, tree), largest first, of two merged partitions; empty parts are not stored."""
    alone = num_parts - len(narrow)
    joined = [(a + b, (left, right)) for (a, left), (b, right) in zip(wide[alone:], reversed(narrow))]
    return sorted(wide[:alone] + joined + narrow[: num_parts - len(wide)], key=itemgetter(0), reverse=True)


def _leaves(tree: int | tuple) -> list[int]:
    """Return the sorted leaves of nested pairs, without recursion: a tree may be as deep as it has leaves."""
    found, open_nodes = [], [tree]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, tuple):
            open_nodes.extend(node)
        else:
            found.append(node)
    return sorted(found)


def _first_fit(samples: Sequence[int], padded: np.ndarray, budget: int) -> list[list[int]]:
    """Return packs by first-fit decreasing: the longest sample first, each into the first pack with room."""
    packs = _Packs(len(samples), budget)
    parts: list[list[int]] = []
    for sample in sorted(samples, key=lambda sample: -padded[sample]):
        place = packs.fill_first(int(padded[sample]))
        if place == len(parts):
            parts.append([])
        parts[place].append(sample)
    return parts


class _Packs:
    """The free tokens of empty packs, as a binary tree of maxima, so that each search takes log2(packs) steps."""

    def __init__(self, num_packs: int, budget: int):
        self._first_leaf = 1 << max(0, num_packs - 1).bit_length()
        self._most = [budget] * (2 * self._first_leaf)  # the children of node n are 2n and 2n + 1

    def fill_first(self, tokens: int) -> int:
        """Put `tokens` into the first pack with room for them, and return its number."""
        node = 1
        while node < self._first_leaf:
            node = 2 * node + (self._most[2 * node] < tokens)
        place = node - self._first_leaf
        self._most[node] -= tokens
        while node > 1:
            node //= 2
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])
        return place


def _rectangles(samples: Sequence[int], padded: np.ndarray, budget: int, multiple: int) -> list[list[int]]:
    """Return rectangles, the longest samples first: samples of similar length waste little padding."""
    order = sorted(samples, key=lambda sample: -padded[sample])
    parts = []
    while order:
        num_rows = budget // int(round_up(padded[order[0]], multiple))
        parts.append(order[:num_rows])
        order = order[num_rows:]
    return parts


def _balanced(
    fitted: list[list[int]], padded: np.ndarray, costs: np.ndarray, budget: int, num_parts: int
) -> list[list[int]]:
    """Return the samples of `fitted` in `num_parts` packs of equal cost if they fit, else of equal length."""
    samples = np.array(sorted(sample for part in fitted for sample in part), dtype=np.int64)
    for weight in (costs, padded):
        parts = []
        for chosen in _equal_parts(weight[samples], num_parts):
            part = samples[chosen]
            if padded[part].sum() > budget:
                break
            parts.append(part.tolist())
        else:
            return parts
    return fitted


def _equal_parts(weights: np.ndarray, num_parts: int) -> Iterator[list[int]]:
    """Yield the indices of `weights` in `num_parts` lists of nearly equal sums, balanced in blocks of _BLOCK_PARTS lists."""
    sizes = [len(block) for block in np.array_split(np.arange(num_parts), -(-num_parts // _BLOCK_PARTS))]
    for members, size in zip(_blocks(weights, sizes), sizes):
        yield from (members[part].tolist() for part in largest_differencing(weights[members], size))


def _blocks(weights: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return the sorted indices of `weights` in blocks with sums in proportion to `sizes`: the largest weight first, each into
    the block that has the least for its size."""
    members: list[list[int]] = [[] for _ in sizes]
    least = [(0.0, block) for block in range(len(sizes))]
    for index in np.argsort(-weights, kind="stable").tolist():
        load, block = least[0]
        members[block].append(index)
        heapq.heapreplace(least, (load + float(weights[index]) / sizes[block], block))
    return [np.array(sorted(block), dtype=np.int64) for block in members]


def _in_order(parts: list[list[int]], costs: np.ndarray, num_parts: int) -> list[list[int]]:
    """Return the most expensive micro-batch first, samples ascending, and empty ones up to `num_parts`."""
    ordered = sorted(map(sorted, parts), key=lambda part: (-costs[part].sum(), part))
    return ordered + [[] for _ in range(num_parts - len(parts))]
