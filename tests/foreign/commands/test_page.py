"""The tables of examples/from_verl.md are those of the code."""

from __future__ import annotations

from pathlib import Path

from dapo_mcore.foreign.commands.page import START, all_tables, verl_tables, write_page

PAGE = Path(__file__).parents[3] / "examples" / "from_verl.md"


def test_the_page_has_the_tables_of_the_code() -> None:
    _, start, tables = PAGE.read_text(encoding="utf-8").partition(START)
    assert start and tables.strip() == all_tables().strip(), "write it anew: python -m dapo_mcore.foreign.commands.page"


def test_only_what_follows_the_mark_is_written_anew(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# By hand\n\n{START}\n\nold\n", encoding="utf-8")
    write_page(page, "new\n")
    assert page.read_text(encoding="utf-8") == f"# By hand\n\n{START}\n\nnew\n"


def test_each_part_is_there() -> None:
    text = verl_tables()
    assert "| `rollout.n` | `rollout.group_size` | responses per prompt |" in text
    assert "| `algo.clip_high` | 0.2 | 0.28 |" in text and "| `algo.dual_clip` | 3.0 | null |" in text
    assert "`reward_model.enable`*" in text and "`trainer.balance_batch`" in text


def test_names_of_slime_and_nemo_follow() -> None:
    text = all_tables()
    assert "| `rollout-batch-size` | `sampling.train_batch_prompts` | prompts per rollout step |" in text
    assert "| `grpo.num_prompts_per_step` | `sampling.train_batch_prompts` |" in text
