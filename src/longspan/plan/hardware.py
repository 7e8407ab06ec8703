"""What a node of GPUs can do on paper: peak FLOP/s, memory, links. All bandwidths are bytes a second, one direction."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GPUS", "Gpu"]


class Gpu(NamedTuple):
    """One GPU and its part of a node."""

    name: str
    flops: float
    """Dense bf16 FLOP/s."""
    memory: float
    """Bytes of device memory."""
    nvlink: float
    """To the other GPUs of the node, all of them together."""
    network: float
    """To other nodes: this GPU's own adapter."""
    host_link: float
    """To the memory of the host."""
    host_memory: float
    """Bytes of host memory of the node."""
    per_node: int = 8

    def host_for_rank(self, num_gpus: int) -> float:
        """Return bytes of host memory for each rank: fewer ranks than a node has GPUs share all of it."""
        return self.host_memory / min(num_gpus, self.per_node)


# Sources: NVIDIA data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU" (SXM modules; the
# dense bf16 figures, half of those with sparsity; NVLink of 600 and 900 GB/s counts both directions) and the
# user guides of DGX A100 (8 HDR adapters of 200 Gb/s, up to 2 TB) and DGX H100 / H200 (8 NDR of 400 Gb/s, 2 TB).
# The A800 and H800 are the A100 and H100 with an NVLink of 400 GB/s in both directions. PCIe 4 x16 carries 32 GB/s
# in one direction, PCIe 5 x16 64 GB/s.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 80e9, 300e9, 25e9, 32e9, 2e12),
        Gpu("a800", 312e12, 80e9, 200e9, 25e9, 32e9, 2e12),
        Gpu("h100", 989e12, 80e9, 450e9, 50e9, 64e9, 2e12),
        Gpu("h800", 989e12, 80e9, 200e9, 50e9, 64e9, 2e12),
        Gpu("h200", 989e12, 141e9, 450e9, 50e9, 64e9, 2e12),
    )
}
"""GPUs by name."""
