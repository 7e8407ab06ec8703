"""What a node of GPUs can do on paper: peak FLOP/s, memory, links. All bandwidths are bytes a second, one direction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from longspan.core.errors import ArgumentError

__all__ = ["CPU", "GPUS", "WORKSPACE", "Gpu", "GpuCount", "MeasuredRates", "gpu_named", "parse_gpus"]

WORKSPACE = 2.5e9
"""Bytes for CUDA's context, NCCL's buffers, library workspaces and fragmentation: not counted, an allowance."""
CPU_WORKSPACE = 1e9
"""The same of a process on a CPU: the interpreter, its libraries, and what the allocator keeps."""


class MeasuredRates(NamedTuple):
    """What was measured on a machine and stands in place of what is assumed of its kind."""

    linear: float
    """Shares of `Gpu.flops`, as in `efficiency.PeakShares`."""
    forward: float
    backward: float
    activations: float = 1.0
    """Bytes that grow with a row, beside those estimated."""
    workspace: float | None = None
    """Bytes beside all tensors; None: the allowance."""


class Gpu(NamedTuple):
    """One GPU and its part of a node."""

    name: str
    flops: float
    """Dense bf16 FLOP/s."""
    memory: float
    """Bytes of device memory."""
    bandwidth: float
    """Of device memory."""
    nvlink: float
    """To the other GPUs of the node, all of them together: NVLink, Infinity Fabric, or PCIe where there is neither."""
    network: float
    """To other nodes: this GPU's own adapter."""
    host_link: float
    """To the memory of the host."""
    host_memory: float
    """Bytes of host memory of the node."""
    per_node: int = 8
    family: str = "ampere"
    """Generation, by which kernels have their efficiency: ampere, ada, hopper, blackwell, cdna3, cpu."""
    measured: MeasuredRates | None = None

    @property
    def workspace(self) -> float:
        """Bytes that are needed beside all tensors."""
        if self.measured is not None and self.measured.workspace is not None:
            return self.measured.workspace
        return CPU_WORKSPACE if self.family == "cpu" else WORKSPACE

    def host_for_rank(self, num_gpus: int) -> float:
        """Return bytes of host memory for each rank: fewer ranks than a node has GPUs share all of it."""
        return self.host_memory / min(num_gpus, self.per_node)


# Sources: dense bf16 is half of the figures with sparsity; links of data sheets are halved where they count both
# directions. PCIe 4 x16 carries 32 GB/s in one direction, PCIe 5 x16 64 GB/s.
#
# A100, A800         NVIDIA data sheet "A100 Tensor Core GPU" (SXM; 40 GB: 1,555 GB/s, 80 GB: 2,039 GB/s; NVLink 600
#                    GB/s, the A800's 400); user guide of DGX A100 (8 HDR adapters of 200 Gb/s, up to 2 TB)
# H100, H200, H800   data sheets "H100" (SXM 1,979 TFLOPS with sparsity, 3.35 TB/s, NVLink 900 GB/s; PCIe 1,513, 2 TB/s;
#                    its bridges join two cards and are not counted) and "H200" (141 GB, 4.8 TB/s; H800: NVLink 400
#                    GB/s); user guide of DGX H100 / H200 (8 NDR adapters of 400 Gb/s, 2 TB)
# GH200              data sheet "GH200 Grace Hopper Superchip": 96 GB HBM3 at 4 TB/s or 144 GB HBM3e at 4.9 TB/s, NVLink
#                    C2C 900 GB/s to 480 GB of LPDDR5X, one GPU a node
# B200, B300         data sheets "DGX B200" (36 PFLOPS bf16 with sparsity and 1,440 GB for 8, 64 TB/s, NVLink 1.8 TB/s,
#                    400 Gb/s a GPU) and "DGX B300" (the same FLOPS in bf16, 2.3 TB for 8, 800 Gb/s a GPU)
# GB200              data sheet "GB200 NVL72": 360 PFLOPS bf16 with sparsity, 13.4 TB and 576 TB/s for 72 in one NVLink
#                    domain; 36 Grace with 480 GB each, whose C2C link two GPUs share
# RTX                whitepapers "Ada GPU Architecture" (4090: 165 TFLOPS, fp32 sums, 1,008 GB/s) and "RTX Blackwell"
#                    (5090: 210, 1,792 GB/s); sheets "RTX 6000 Ada" (1,457 TFLOPS fp8 with sparsity, 960 GB/s),
#                    "RTX PRO 6000 Blackwell" (4,000 TOPS fp4 with sparsity, 96 GB, 1,792 GB/s), "RTX A6000" (309.7
#                    with sparsity, 768 GB/s; bridges of two are not counted)
# L40S, L4           data sheets (733 with sparsity, 864 GB/s; 242 with sparsity, 300 GB/s)
# MI300X, MI325X     AMD data sheets: 1,307.4 TFLOPS, 192 GB at 5.3 TB/s and 256 GB at 6 TB/s; 7 Infinity Fabric links
#                    of 128 GB/s in both directions
#
# The network of workstation cards and of L4 and L40S is no vendor's figure: 100 Gb/s a node of four, as clouds have it.
def _card(name: str, flops: float, memory: float, bandwidth: float, pcie: float, family: str) -> Gpu:
    return Gpu(name, flops, memory, bandwidth, pcie, 3.125e9, pcie, 2.56e11, 4, family)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 80e9, 2.039e12, 300e9, 25e9, 32e9, 2e12),
        Gpu("a100-40", 312e12, 40e9, 1.555e12, 300e9, 25e9, 32e9, 1e12),
        Gpu("a800", 312e12, 80e9, 2.039e12, 200e9, 25e9, 32e9, 2e12),
        Gpu("h100", 989e12, 80e9, 3.35e12, 450e9, 50e9, 64e9, 2e12, family="hopper"),
        Gpu("h100-pcie", 756e12, 80e9, 2e12, 64e9, 25e9, 64e9, 2e12, family="hopper"),
        Gpu("h800", 989e12, 80e9, 3.35e12, 200e9, 50e9, 64e9, 2e12, family="hopper"),
        Gpu("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 64e9, 2e12, family="hopper"),
        Gpu("gh200", 989e12, 96e9, 4e12, 450e9, 50e9, 450e9, 480e9, 1, family="hopper"),
        Gpu("gh200-144", 989e12, 144e9, 4.9e12, 450e9, 50e9, 450e9, 480e9, 1, family="hopper"),
        Gpu("b200", 2250e12, 180e9, 8e12, 900e9, 50e9, 64e9, 2e12, family="blackwell"),
        Gpu("b300", 2250e12, 288e9, 8e12, 900e9, 100e9, 128e9, 2e12, family="blackwell"),
        Gpu("gb200", 2500e12, 186e9, 8e12, 900e9, 50e9, 225e9, 17.28e12, 72, family="blackwell"),
        _card("rtx-4090", 165e12, 24e9, 1.008e12, 32e9, "ada"),
        _card("rtx-5090", 210e12, 32e9, 1.792e12, 64e9, "ada"),
        _card("rtx-6000-ada", 364e12, 48e9, 9.6e11, 32e9, "ada"),
        _card("rtx-pro-6000", 500e12, 96e9, 1.792e12, 64e9, "ada"),
        _card("a6000", 155e12, 48e9, 7.68e11, 32e9, "ampere"),
        _card("l40s", 366e12, 48e9, 8.64e11, 32e9, "ada"),
        _card("l4", 121e12, 24e9, 3e11, 32e9, "ada"),
        Gpu("mi300x", 1307e12, 192e9, 5.3e12, 448e9, 50e9, 64e9, 2e12, family="cdna3"),
        Gpu("mi325x", 1307e12, 256e9, 6e12, 448e9, 50e9, 64e9, 2e12, family="cdna3"),
    )
}
"""GPUs by name."""

# What torch calls them.
_DEVICE_NAMES = (
    ("a100.*40gb", "a100-40"), ("a100", "a100"), ("a800", "a800"), ("gh200.*144g", "gh200-144"), ("gh200", "gh200"),
    ("h100 pcie", "h100-pcie"), ("h100", "h100"), ("h800", "h800"), ("h200", "h200"), ("gb200", "gb200"),
    ("b200", "b200"), ("b300", "b300"), ("4090", "rtx-4090"), ("5090", "rtx-5090"), ("6000 ada", "rtx-6000-ada"),
    ("pro 6000", "rtx-pro-6000"), ("rtx a6000", "a6000"), ("l40s", "l40s"), (r"\bl4\b", "l4"), ("mi300x", "mi300x"),
    ("mi325x", "mi325x"),
)  # fmt: skip
# What people call them beside, where it leaves no doubt which is meant.
_BESIDE = {
    "a100-80": "a100", "h100-80": "h100", "h200-141": "h200", "b200-180": "b200",
    "rtx-a6000": "a6000", "6000-ada": "rtx-6000-ada", "pro-6000": "rtx-pro-6000", "mi300": "mi300x",
}  # fmt: skip
_COUNT = re.compile(r"(?:(\d+)x)?(?:(\d+)x)?(\{.*\}|[a-z0-9][a-z0-9_ -]*)", re.DOTALL)
_FIELDS = tuple(name for name in Gpu._fields if name not in ("name", "measured"))
FAMILIES = ("ampere", "ada", "hopper", "blackwell", "cdna3", "cpu")
CPU = "cpu"
"""This machine without a GPU, whose figures are measured."""


class GpuCount(NamedTuple):
    """So many of one GPU."""

    num: int
    gpu: Gpu


def gpu_named(device: str) -> Gpu | None:
    """Return the GPU that torch calls by this name, None where there are no figures for it."""
    found = next((name for pattern, name in _DEVICE_NAMES if re.search(pattern, device.lower())), None)
    return None if found is None else GPUS[found]


def parse_gpus(text: str) -> GpuCount:
    """Parse `8xh100`, `h100` for one, `4x2xl40s` for four nodes of two, `8x{like: h100, memory: 94e9}` for one's own.

    `4090`, `rtx4090`, `a100-80gb` and the like are understood too.

    Raises:
        ArgumentError: no such GPU, or none of them.
    """
    match = _COUNT.fullmatch(text.strip() if "{" in text else text.strip().lower())
    if match is None:
        raise _unknown(text)
    first, second, name = match.groups()
    if name == CPU:
        if (first or "1") != "1" or second:
            raise ArgumentError("there is one machine to measure", found=repr(text), allowed=CPU)
        return GpuCount(1, Gpu(CPU, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1, CPU))
    gpu = _own_gpu(name, text) if name.startswith("{") else GPUS.get(_plain(name))
    nodes, per_node = (int(first), int(second)) if second else (1, None)
    num = nodes * per_node if per_node is not None else int(first or 1)
    if gpu is None or num < 1:
        raise _unknown(text)
    return GpuCount(num, gpu if per_node is None else gpu._replace(per_node=per_node))


def _plain(name: str) -> str:
    """Return the name in GPUS of a name that people write: `NVIDIA A100-SXM4-80GB`, `RTX 4090`, `4090`."""
    name = re.sub(r"[ _-]+", "-", name)
    name = re.sub(r"^(?:nvidia-|amd-|instinct-|geforce-)+|(?<=\d)gb$|-sxm\d?(?=-|$)", "", name)
    name = re.sub(r"^(?:rtx-?)?(?=\d{4}$)|^rtx-?(?=\d)", "rtx-", name)
    return _BESIDE.get(name, name)


def _unknown(text: str) -> ArgumentError:
    return ArgumentError(
        "these are no GPUs that are known here",
        found=repr(text),
        allowed=f"a number and one of {', '.join(GPUS)}, such as 8xh100, or 4x2xl40s for four nodes of two; {CPU}",
        fix="give the figures of another: --gpus '8x{like: h100, memory: 94e9, network: 12.5e9}'",
    )


def _own_gpu(text: str, whole: str) -> Gpu:
    """Return a GPU from figures of one's own; what they leave out is that of the one they are like."""
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentError("these figures of a GPU are not YAML", found=whole) from error
    fields = {str(name): value for name, value in fields.items()} if isinstance(fields, Mapping) else {}
    like = fields.pop("like", None)
    known = None if like is None else _plain(str(like).lower())
    unknown = sorted(fields.keys() - {*_FIELDS})
    missing = [
        name
        for name in ("flops", "memory", "bandwidth", "nvlink", "host_link", "host_memory")
        if name not in fields
    ]
    if unknown or (like is None and missing) or (known is not None and known not in GPUS):
        raise ArgumentError(
            "these figures describe no GPU",
            found=f"unknown {', '.join(unknown)}"
            if unknown
            else f"like: {like}"
            if like is not None
            else f"no {', '.join(missing)}",
            allowed=f"{', '.join(_FIELDS)}; like: one of {', '.join(GPUS)}",
        )
    base = (
        GPUS[known]._asdict()
        if known is not None
        else {"network": fields.get("nvlink"), "per_node": 8, "family": "ampere"}
    )
    return Gpu(**{**base, **_numbers(fields), "name": f"own ({known})" if known else "own"})


def _numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "family":
            if value not in FAMILIES:
                raise ArgumentError(
                    "family of a GPU is one of", found=repr(value), allowed=", ".join(FAMILIES)
                )
            found[name] = value
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = 0.0
        if not 0 < number < float("inf"):
            raise ArgumentError(f"{name} of a GPU is a number above 0", found=repr(value))
        found[name] = int(number) if name == "per_node" else number
    return found
