"""Parameters, gradients and optimizer state sharded over ranks (FSDP2).

Each transformer block is one unit: its parameters are gathered when it is computed and dropped after; embeddings,
last norm and head are the unit of the root. Master weights stay in the type of the model (fp32), blocks compute
in `compute_dtype`, gradients are reduced in fp32.

Gradients are SUMS over ranks. The loss of each rank is a sum already divided by the weight of the whole step, so
an average over ranks would divide twice.

PyTorch FSDP: arXiv:2304.11277; HSDP is its hybrid sharding.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from longspan.core.errors import ArgumentError

__all__ = ["full_tensor", "shard_like", "shard_model"]


def shard_model(
    root: nn.Module,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> None:
    """Shard the parameters of `root` in place: every member of a module list by itself, the rest with the root.

    From then on parameters are DTensors, of which each rank holds its part, and only `root` and what it calls may
    be run. Parameters that two modules share (tied heads) stay one. Optimizers are built afterwards.

    Args:
        root: a module whose forward runs everything that has parameters, the loss too.
        mesh: (shards,) or (replicas, shards), as `Mesh.fsdp`.
        compute_dtype: type of parameters and activations in the forward and backward pass; None = as they are.
        reduce_dtype: type in which gradients are summed over ranks.
        offload: keep parameters, gradients and optimizer state in host memory.

    Raises:
        ArgumentError: a model without blocks.
    """
    blocks = [block for module in root.modules() if isinstance(module, nn.ModuleList) for block in module]
    if not blocks:
        raise ArgumentError(f"{type(root).__name__} has no list of blocks to shard")
    pinned = mesh.device_type == "cuda"
    for module in (*blocks, root):
        fully_shard(
            module,
            mesh=mesh,
            # Tensors that come in have their type for a reason: loss weights, positions, angles.
            mp_policy=MixedPrecisionPolicy(
                param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
            ),
            offload_policy=CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
        )
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # As a plain sum: gloo has no scaled one.
            module.set_force_sum_reduction_for_comms(True)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a sharded tensor on every rank, which all ranks call together; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of `whole`, which every rank holds, sharded as `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole.to(like.device, copy=True)
    part = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    # That part is on the device of the mesh; an offloaded one belongs to the host.
    own = torch.empty_like(like, dtype=whole.dtype, requires_grad=False)
    assert isinstance(own, DTensor)
    with torch.no_grad():
        own.to_local().copy_(part.to_local())
    return own
