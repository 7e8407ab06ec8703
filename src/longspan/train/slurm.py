"""A file for sbatch that starts a run on the nodes that its processes need."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from longspan.core.errors import ArgumentError


def sbatch_script(command: Sequence[str], *, world: int, per_node: int, name: str) -> str:
    """Return a file for sbatch that runs `longspan COMMAND` in `world` processes, one a GPU, `per_node` on a node.

    srun starts one torchrun a node. A job that is requeued goes on from its last checkpoint; so does torchrun itself,
    up to three times, when a process is lost.

    Raises:
        ArgumentError: the processes do not fill whole nodes.
    """
    on_node = min(world, per_node)
    if world % on_node:
        raise ArgumentError(
            "the processes of the recipe do not fill whole nodes",
            found=f"{world} processes, {per_node} GPUs a node",
            fix="choose degrees of `parallel` whose product is a multiple of --gpus-per-node, or another number",
        )
    nodes = world // on_node
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={on_node}
#SBATCH --cpus-per-task={8 * on_node}
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log

# All nodes see the same recipe, data and run folder. After a lost job, submit this file again: it goes on.
export OMP_NUM_THREADS=8
# A new store for every attempt: in a shared one the addresses of lost processes are found again.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \\
    --nnodes={nodes} --nproc-per-node={on_node} --max-restarts=3 \\
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 30000))" \\
    -m longspan {shlex.join(command)}
"""
