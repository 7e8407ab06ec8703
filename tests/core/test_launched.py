"""Which process of a run this is, by what torchrun and srun leave in the environment."""

from __future__ import annotations

import pytest

from longspan.core.launched import Launched, first_host, launched

TASK = {
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "40001",
    "SLURM_STEP_ID": "0",
}


def test_a_task_of_srun_knows_its_place_and_where_to_meet() -> None:
    """A local rank taken from the global one asks for a GPU that the node does not have."""
    assert launched(TASK) == Launched(rank=11, world=16, local_rank=3, address="gpu07", port=30001)
    moved = launched({**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert moved is not None and (moved.address, moved.port) == ("10.0.0.1", 29500)


def test_torchrun_under_srun_is_asked_first() -> None:
    """Each torchrun is a task of srun: by srun's numbers, all its processes would have one rank."""
    inner = {**TASK, "RANK": "90", "WORLD_SIZE": "128", "LOCAL_RANK": "2"}
    assert launched(inner) == Launched(rank=90, world=128, local_rank=2, address=None, port=None)


def test_the_script_of_a_job_and_a_shell_on_a_node_are_one_process() -> None:
    """sbatch sets SLURM_NTASKS and SLURM_PROCID for the script too: it would wait for tasks that never start."""
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a"}
    assert launched(script) is None
    assert launched({**script, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert launched({}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-012,15],login1", "gpu007"),
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("n[3,5]", "n3"),
        ("rack1-n[01-04]-x,z", "rack1-n01-x"),
    ],
)
def test_the_first_name_of_a_node_list(nodes: str, first: str) -> None:
    """Leading zeros are part of the name."""
    assert first_host(nodes) == first
