"""Tools of a user's own, for tests: good ones and all kinds of bad ones."""

from __future__ import annotations

import asyncio
import os
import time

from dapo_mcore.tools.result import ToolUnavailable


def echo(query: str) -> str:
    """Return the query."""
    return query


async def echo_later(query: str) -> str:
    await asyncio.sleep(0.05)
    return query


def values(query: str):
    return {
        "none": None,
        "list": [1, "é"],
        "bytes": b"no",
        "set": {1},
        "nan": float("nan"),
        "long": "a" * 50_000 + "z" * 50_000,
        "pid": os.getpid(),
        "secret": os.environ.get("RAY_AUTH_TOKEN"),
    }[query]


def act(query: str) -> str:
    """Do what the query says, to this process too."""
    word, _, rest = query.partition(" ")
    if word == "sleep":
        time.sleep(float(rest))
    elif word == "exit":
        os._exit(3)
    elif word == "quit":
        raise SystemExit(3)
    elif word == "raise":
        raise ValueError(rest)
    elif word == "away":
        raise ToolUnavailable(rest)
    elif word == "refused":
        raise ConnectionRefusedError(rest)
    elif word == "print":
        print(rest, flush=True)
    return f"did {query}"


async def act_async(query: str) -> str:
    word, _, rest = query.partition(" ")
    if word == "sleep":
        await asyncio.sleep(float(rest))
    elif word == "block":
        time.sleep(float(rest))
    elif word == "quit":
        raise SystemExit(3)
    return f"did {query}"


class Counter:
    """Counts the calls of one sample, and writes its total to a file at the end."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, query: str) -> str:
        self.calls.append(query)
        if query == "die":
            os._exit(1)
        return f"{os.getpid()} {' '.join(self.calls)}"

    def close(self) -> None:
        with open(os.environ["COUNTER_FILE"], "a") as file:
            file.write(f"{' '.join(self.calls)}\n")


class NotCallable:
    pass


def two(query: str, more: str) -> str:
    return query + more
