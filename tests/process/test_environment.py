"""Importing the module changes settings of libraries that are loaded later."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.process import environment

NAMES = ("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY")


@pytest.fixture(autouse=True)
def everything_as_before() -> Iterator[None]:
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setenv(name, "to be restored")
        yield
    logging.disable(logging.NOTSET)


def test_the_import_sets_what_the_user_has_not_set() -> None:
    for name in NAMES:
        del os.environ[name]
    importlib.reload(environment)
    assert [os.environ[name] for name in NAMES] == ["passive", "false", "error"]


def test_a_value_of_the_user_stays() -> None:
    os.environ.update(dict.fromkeys(NAMES, "mine"))
    importlib.reload(environment)
    assert [os.environ[name] for name in NAMES] == ["mine"] * 3


def test_warnings_of_libraries_are_silent_and_errors_are_not(caplog: pytest.LogCaptureFixture) -> None:
    importlib.reload(environment)
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn("an optional package is missing", UserWarning, stacklevel=1)
    logging.getLogger("library").warning("an optional package is missing")
    logging.getLogger("library").error("broken")
    assert shown == [] and [record.message for record in caplog.records] == ["broken"]


def test_a_deterministic_run_sets_what_the_user_has_not_set_and_refuses_the_rest() -> None:
    chosen = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "HOME": "mine"}
    environment.set_deterministic(chosen)
    assert chosen == {
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "HOME": "mine",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Ring",
    }
    with pytest.raises(ConfigError, match=r"needs NCCL_ALGO=Ring, but the environment has NCCL_ALGO=Tree; unset it"):
        environment.set_deterministic({"NCCL_ALGO": "Tree"})
