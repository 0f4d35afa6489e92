"""The tables of examples/from_verl.md, from the table that converts: `python -m dapo_mcore.foreign.commands.page` writes them anew.

Change here: how a dialect's table looks on its page. The words before it are written by hand in the page itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dapo_mcore.config.foreign_names import NEMO, SLIME, TITLES, Name
from dapo_mcore.foreign.convert import convert
from dapo_mcore.foreign.settings import ForeignRun, ForeignSetting
from dapo_mcore.foreign.table import Rule, Table
from dapo_mcore.foreign.tables.verl import NAMES, VERL
from dapo_mcore.foreign.write import default_of, shown

START = "<!-- from here on generated: python -m dapo_mcore.foreign.commands.page -->"
_PREFIX = "actor_rollout_ref."
_OF_EACH_RUN = ("name", "model.path", "data.files", "eval.sets.", "observe.")
"""Keys whose default is a place or a name of verl's own example."""


def page_tables(table: Table, names: Mapping[str, Name], plainest: tuple[ForeignSetting, ...]) -> str:
    """Return the tables as Markdown: names, defaults, losses, and what means nothing.

    plainest: the settings of a run whose defaults are compared with ours.
    """
    run = ForeignRun(table.dialect, Path("run.sh"), "", "", plainest)
    blocks = [
        _names("## Names and units", table.dialect, names),
        ["", "## Defaults that differ", "", f"| here | {table.title} | ours |", "|---|---|---|"],
        _defaults(table, run),
        [
            "",
            "## Lost",
            "",
            "Those with a star change what is optimised: the import ends with status 3 unless they are accepted.",
            "",
        ],
        (f"- {_keys(rule)}: {rule.about}" for rule in table.rules if _is_loss(rule)),
        ["", "## Meaningless here", ""],
        (f"- {rule.title} ({rule.about}): {_keys(rule)}" for rule in table.rules if rule.title),
    ]
    return "\n".join(line for block in blocks for line in block) + "\n"


def all_tables() -> str:
    """Return the tables of verl, then the names of slime and NeMo-RL."""
    others = {"slime": SLIME, "nemo": NEMO}
    tables = ("\n".join(_names(f"## Names of {TITLES[key]}", TITLES[key], names)) for key, names in others.items())
    return verl_tables() + "".join(f"\n{table}\n" for table in tables)


def write_page(path: Path, tables: str) -> None:
    """Replace what follows START in a page."""
    head = path.read_text(encoding="utf-8").partition(START)[0]
    path.write_text(f"{head}{START}\n\n{tables}", encoding="utf-8")


def verl_tables() -> str:
    """Return the tables of verl, with the defaults of a run with the estimator grpo."""
    return page_tables(VERL, NAMES, (ForeignSetting("algorithm.adv_estimator", "grpo", "run.sh line 1"),))


def _defaults(table: Table, run: ForeignRun) -> Iterator[str]:
    conversion = convert(run, table)
    for ours, (value, outcomes) in conversion.values().items():
        own = default_of(ours)
        own_place = ours.startswith(_OF_EACH_RUN)
        if value != own and not own_place and not any(conversion.places(outcome) for outcome in outcomes):
            yield f"| `{ours}` | {shown(value)} | {shown(own)} |"


def _names(heading: str, title: str, names: Mapping[str, Name]) -> list[str]:
    head = [heading, "", f"| {title} | here | unit, and how the value is converted |", "|---|---|---|"]
    return head + [f"| `{_short(key)}` | {_code(name.keys)} | {_cell(name.unit)} |" for key, name in names.items()]


def _is_loss(rule: Rule) -> bool:
    return bool(not rule.ours and rule.about and not rule.title)


def _keys(rule: Rule) -> str:
    return ", ".join(f"`{_short(key)}`" + ("*" if rule.objective else "") for key in rule.keys)


def _code(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _short(key: str) -> str:
    return key.removeprefix(_PREFIX)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    write_page(Path(sys.argv[1] if len(sys.argv) > 1 else "examples/from_verl.md"), all_tables())
