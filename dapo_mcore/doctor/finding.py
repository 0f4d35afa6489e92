"""The record that every check returns.

Change here: the states a finding can have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from dapo_mcore.errors import DapoError


class State(Enum):
    """What a finding means for a run. Only WRONG stands in its way."""

    OK = "ok"
    FALLBACK = "falls back"
    """Something is missing, and slower code takes its place."""
    HINT = "hint"
    """Something looks odd. It may slow a run down or stop it."""
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    name    what was looked at: `Transformer Engine`
    detail  what was found, with its numbers
    remedy  what to do about it; empty if there is nothing to do
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Finding:
    return Finding(name, State.OK, detail)


def fallback(name: str, detail: str, remedy: str = "") -> Finding:
    return Finding(name, State.FALLBACK, detail, remedy)


def hint(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name, State.HINT, detail, remedy)


def wrong(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name, State.WRONG, detail, remedy)


def outcome(name: str, detail: str, action: Callable[[], object]) -> Finding:
    """Return `detail` if the action succeeds, else its error."""
    try:
        action()
    except ImportError as error:
        return wrong(name, str(error), "pip install dapo_mcore again, with its dependencies")
    except DapoError as error:
        return refusal(name, error)
    return ok(name, detail)


def refusal(name: str, error: DapoError) -> Finding:
    """Return the error as a finding. Its last clause is the remedy, as everywhere in this project."""
    what, _, remedy = str(error).rpartition("; ")
    return wrong(name, what or remedy, remedy if what else "")
