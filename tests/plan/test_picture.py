from __future__ import annotations

import pytest

from dapo_mcore.plan.batch import batch_of
from dapo_mcore.plan.held import GIB, Use
from dapo_mcore.plan.memory import memory_of
from dapo_mcore.plan.picture import LETTERS, bar, bars, folded, keep, table
from tests.plan.jobs import job


def test_a_bar_is_as_long_as_the_capacity() -> None:
    use = Use("here", {"parameters": 20.0, "activations": 50.0, "reserve": 10.0}, 100.0)
    assert bar(use, 10) == "|PPAAAAAr..|"


def test_a_small_part_has_a_cell_and_what_is_too_much_is_beyond_the_end() -> None:
    assert bar(Use("", {"parameters": 1.0, "gradients": 1.0}, 100.0), 10) == "|PG........|"
    assert bar(Use("", {"parameters": 80.0, "activations": 40.0}, 100.0), 10) == "|PPPPPPPPAA|AA"


def test_every_part_of_a_gpu_has_a_letter() -> None:
    for own in (job(algo__kl__coef=0.1, model__fp8={}), job(rollout={"engine": "embedded"})):
        memory = memory_of(own, batch_of(own))
        names = {name for use in (*memory.train, memory.sync, memory.server.use) for name in use.parts}
        assert names <= LETTERS.keys()


def test_the_picture_shows_a_few_stages_and_says_no() -> None:
    own = job(parallel__tensor_parallel=2, parallel__pipeline_parallel=8, model__recompute="none")
    lines = folded(bars(memory_of(own, batch_of(own))))
    shown = [line for line in lines if "|" in line]
    assert [line.split("|")[0].strip() for line in shown] == [
        "train stage 0 of 8", "train stage 7 of 8", "sync, rank 0", "generate, servers",
    ]  # fmt: skip
    assert shown[0].endswith("NO") and not shown[1].endswith("NO")
    assert all(len(line) <= 100 for line in lines)


def test_the_table_adds_up() -> None:
    own = job()
    memory = memory_of(own, batch_of(own))
    lines = list(table(memory))
    assert lines[1].split() == ["parameters", "3.81", "3.81", "-"]
    assert float(lines[-1].split()[1]) == round(memory.worst.total / GIB, 2)


def test_lines_are_folded_between_words_that_do_not_belong_together() -> None:
    words = "  first " + " ".join(keep(f"{word * 3} {number}") for number, word in enumerate(("aa", "bb", "cc")))
    assert folded(["short", words], 20) == ["short", "  first aaaaaa 0", "      bbbbbb 1", "      cccccc 2"]
    assert folded(["x" * 30], 20) == ["x" * 30]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_bars_fill_a_terminal_and_their_numbers_are_in_one_column(width: int) -> None:
    own = job(parallel__tensor_parallel=2, parallel__pipeline_parallel=8, model__recompute="none")
    shown = [line for line in bars(memory_of(own, batch_of(own)), width) if "|" in line]
    assert max(map(len, shown)) == width
    assert len({line.rindex(".") for line in (line.removesuffix("  NO") for line in shown)}) == 1
