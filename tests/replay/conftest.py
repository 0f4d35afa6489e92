"""The layout of a job of one process, as the tests of the actor have it."""

from tests.actor.conftest import alone

__all__ = ["alone"]
