"""The sbatch file of a run."""

from __future__ import annotations

import subprocess

import pytest

from longspan.core.errors import ArgumentError
from longspan.train.config import ParallelConfig
from longspan.train.slurm import sbatch_script


def test_a_run_of_sixteen_fills_two_nodes_and_the_file_is_bash() -> None:
    """One task too many a node starts torchrun twice; a word that is not quoted is a command."""
    parallel = ParallelConfig(dp_shard=2, cp_ring=8)
    command = ["train", "my recipe.yaml", "--set", "seed=1"]
    script = sbatch_script(command, world=parallel.world, per_node=8, name="long")
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8"):
        assert line in script.splitlines()
    assert "--nnodes=2 --nproc-per-node=8" in script
    assert script.endswith("-m longspan train 'my recipe.yaml' --set seed=1\n")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_processes_that_do_not_fill_nodes_are_refused() -> None:
    """Slurm would give whole nodes, and the mesh would not fit them."""
    with pytest.raises(ArgumentError, match="12 processes, 8 GPUs a node"):
        sbatch_script([], world=12, per_node=8, name="x")
    assert "--gpus-per-node=4" in sbatch_script([], world=4, per_node=8, name="x")
