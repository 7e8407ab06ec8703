"""Parameters, gradients and optimizer state sharded over ranks (FSDP2).

Each transformer block is one unit: its parameters are gathered when it is computed and dropped after; embeddings,
last norm and head are the unit of the root. The experts of a mixture, most of a block's weights, are a unit of their
own: they are not there while the block attends. Master weights stay in the type of the model (fp32), blocks compute
in `compute_dtype`, gradients are reduced in fp32.

Gradients are SUMS over ranks. The loss of each rank is a sum already divided by the weight of the whole step, so
an average over ranks would divide twice.

PyTorch FSDP: arXiv:2304.11277; HSDP is its hybrid sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from longspan.core.errors import ArgumentError
from longspan.kernels.experts import experts_in

__all__ = ["OwnPart", "fill", "full_tensor", "own_part", "shard_like", "shard_model"]


def shard_model(
    root: nn.Module,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    offload: bool = False,
    from_first: bool = False,
) -> None:
    """Shard the parameters of `root` in place: every member of an outermost module list by itself, its experts apart
    from it, the rest with the root.

    From then on parameters are DTensors, of which each rank holds its part, and only `root` and what it calls may
    be run. Parameters that two modules share (tied heads) stay one. Optimizers are built afterwards.

    Args:
        root: a module whose forward runs everything that has parameters, the loss too.
        mesh: (shards,) or (replicas, shards), as `Mesh.fsdp`.
        compute_dtype: type of parameters and activations in the forward and backward pass; None = as they are.
        reduce_dtype: type in which gradients are summed over ranks.
        offload: keep parameters, gradients and optimizer state in host memory.
        from_first: the first rank has the values, in host memory, and the others have the same model on the meta
            device: a block after the other is sent before it is sharded, so no other rank holds more than one whole.

    Raises:
        ArgumentError: a model without blocks.
    """
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
    # A list inside a block (experts) goes with the block: a rank without tokens for an expert would not gather it.
    inside = {id(module) for blocks in lists for block in blocks for module in block.modules()}
    blocks = [block for module in lists if id(module) not in inside for block in module]
    if not blocks:
        raise ArgumentError(f"{type(root).__name__} has no list of blocks to shard")
    experts = [unit for block in blocks for unit in experts_in(block).values()]
    pinned = mesh.device_type == "cuda"
    for module in (*experts, *blocks, root):
        if from_first:
            _receive(module, torch.device(mesh.device_type))
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


@torch.no_grad()
def _receive(root: nn.Module, device: torch.device) -> None:
    """Send what is not sharded yet of a module from the first rank to the others, in place."""
    first = dist.get_rank() == 0
    # Shared ones (tied heads) are sent once and stay shared.
    made: dict[int, torch.Tensor] = {}
    places = [
        (entries, name)
        for module in root.modules()
        for entries in (module._parameters, module._buffers)
        for name, tensor in entries.items()
        if tensor is not None and not isinstance(tensor, DTensor)
    ]
    told = [[(tuple(entries[name].shape), entries[name].dtype) for entries, name in places]]  # type: ignore[union-attr]
    dist.broadcast_object_list(told, src=0)
    for (entries, name), (shape, dtype) in zip(places, told[0], strict=True):
        tensor = entries[name]
        assert tensor is not None
        if id(tensor) not in made:
            values = tensor.to(device) if first else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(values, src=0)
            new = nn.Parameter(values, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new if isinstance(tensor, nn.Parameter) else values
        entries[name] = made[id(tensor)]  # type: ignore[assignment]


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


class OwnPart(NamedTuple):
    """The rows of a tensor that this rank holds."""

    local: torch.Tensor
    start: int
    """First row, in the whole tensor."""
    is_writer: bool
    """Whether no other rank has to write them."""


def own_part(tensor: torch.Tensor) -> OwnPart:
    """Return this rank's part of a sharded tensor; one that is not sharded is whole on every rank."""
    if not isinstance(tensor, DTensor):
        return OwnPart(tensor, 0, not dist.is_initialized() or dist.get_rank() == 0)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    local, start, is_writer = tensor.to_local(), 0, True
    for place, size, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0
            # As torch.chunk deals rows: the last ranks may have fewer, or none.
            start = min(place * -(-tensor.shape[0] // size), tensor.shape[0])
        else:
            is_writer = is_writer and place == 0
    return OwnPart(local, start, is_writer and (local.numel() > 0 or tensor.numel() == 0))


@torch.no_grad()
def fill(tensor: torch.Tensor, read: Callable[[int, int], torch.Tensor]) -> None:
    """Put values into this rank's part of a tensor; `read(start, rows)` returns rows of the whole one."""
    own = own_part(tensor)
    if own.local.ndim == 0:
        own.local.copy_(read(0, 0))
    elif own.local.shape[0]:
        own.local.copy_(read(own.start, own.local.shape[0]))
