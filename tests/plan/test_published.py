"""The planner beside rows that others published; the table is benchmarks/plan.md."""

from __future__ import annotations

import statistics

import pytest
from benchmarks.plan_published import SPEEDS, predicted_speed, time_error
from benchmarks.plan_published_memory import ROWS, memory_error

from longspan.core.errors import ArgumentError
from longspan.plan.efficiency import ATTENTION, LINEAR, default_kernel, shares_of
from longspan.plan.hardware import GPUS, gpu_named, parse_gpus


def test_held_out_steps_are_met() -> None:
    """A change that meets the rows it was fitted to and loses all others."""
    errors = {row: time_error(row, predicted_speed(row)) for row in SPEEDS if row.model != "qwen3-30b-a3b"}
    assert all(abs(error) < 0.05 for row, error in errors.items() if row.fitted)
    held_out = [abs(error) for row, error in errors.items() if not row.fitted]
    assert len(held_out) >= 26 and statistics.median(held_out) < 0.1
    # What is far off says why.
    assert all(row.note for row, error in errors.items() if abs(error) > 0.25)


def test_memory_of_published_runs_is_met() -> None:
    """A part of a step's memory that our own counts do not see, or one that is counted twice."""
    errors = {row: memory_error(row) for row in ROWS if row.model != "qwen3-30b-a3b"}
    assert len(errors) >= 28 and statistics.median(map(abs, errors.values())) < 0.12
    assert statistics.median(abs(error) for row, error in errors.items() if row.gb) < 0.12
    assert all(row.note for row, error in errors.items() if abs(error) > 0.25)


def test_every_gpu_has_shares_for_its_kernel() -> None:
    """A GPU in the table that ends in a KeyError, or a kernel on one that it does not run on."""
    for gpu in GPUS.values():
        assert 0 < shares_of(gpu.family).forward < 1 and gpu.memory > 1e10 and gpu.bandwidth > 1e11
    assert {family for family, _ in ATTENTION} <= {*LINEAR}
    assert (
        default_kernel("hopper") == "fa3" and shares_of("hopper", "fa2").forward < shares_of("hopper").forward
    )
    with pytest.raises(ArgumentError, match="does not run"):
        shares_of("ampere", "fa3")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H200", "h200"), ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA RTX A6000", "a6000"), ("NVIDIA L40S", "l40s"), ("AMD Instinct MI300X", "mi300x"), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_devices_by_torchs_name(device: str, name: str | None) -> None:
    """An A100 of 40 GB planned as one of 80, or an L40S as an L4."""
    found = gpu_named(device)
    assert (None if found is None else found.name) == name


def test_nodes_of_other_sizes() -> None:
    """Four nodes of two GPUs share links in twos."""
    num, gpu = parse_gpus("4x2xl40s")
    assert (num, gpu.per_node) == (8, 2)
    assert parse_gpus("8x{like: l40s, per_node: 2}").gpu.per_node == 2
    with pytest.raises(ArgumentError, match="no GPUs that are known"):
        parse_gpus("0x2xh100")
