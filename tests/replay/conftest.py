"""The layout of a job of one process, and the quickstart's task, as other tests have them."""

from tests.actor.conftest import alone
from tests.train.conftest import task

__all__ = ["alone", "task"]
