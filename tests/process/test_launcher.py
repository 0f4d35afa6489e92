"""The variables of a launcher. tests/train/test_end.py shows that ranks end with their torchrun."""

from __future__ import annotations

import os

import pytest

from dapo_mcore.errors import ConfigError
from dapo_mcore.process.launcher import check_launcher, ranks_here, shutdown_timeout_note

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        TORCHRUN,
        {**TORCHRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "8"},  # a shell of salloc
        {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_the_variables_of_one_process_of_a_job_are_accepted(environment: dict[str, str]) -> None:
    check_launcher(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "srun has started 2 tasks.*each would be a whole run.*torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, "srun has started 4 tasks"),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun has started 3 tasks"),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, "mpiexec has started 3 tasks"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK, MASTER_ADDR, MASTER_PORT is not.*unset WORLD_SIZE"),
        ({"RANK": "0"}, "RANK=0 is set, but WORLD_SIZE"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is not"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE=two must be a whole number.*unset RANK and WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "-1", "LOCAL_RANK": "x"}, "RANK=-1, LOCAL_RANK=x must be"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ],
)
def test_variables_that_describe_no_process_of_a_job_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_launcher(environment)


def test_only_torchrun_limits_the_time_that_a_run_has_to_save() -> None:
    assert (
        shutdown_timeout_note(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"})
        == "; torchrun waits 30 s for it, or --shutdown-timeout"
    )
    assert shutdown_timeout_note({}) == shutdown_timeout_note({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == ""


def test_the_ranks_of_a_machine_are_the_children_of_its_torchrun() -> None:
    assert os.getpid() in ranks_here(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"})
    assert ranks_here(TORCHRUN) == []
