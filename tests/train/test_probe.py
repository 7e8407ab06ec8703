"""Steps that are really run correct the plan; a CPU's figures are measured."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from longspan.core.errors import ArgumentError
from longspan.plan.hardware import GPUS, parse_gpus
from longspan.plan.models import ModelShape
from longspan.plan.training_step import Adapters
from longspan.train import machine
from longspan.train import probe as probing
from longspan.train.machine import measured_cpu
from longspan.train.probe import Probed, correction

H100 = GPUS["h100"]
SMALL = ModelShape("small", 2, 64, 2, 2, 32, 128, 512)


def rows(a: float, b: float, grows: float, beyond: float) -> list[Probed]:
    """What two rows measure where matrices take `a` and attention `b` times as long as estimated."""
    estimates = [(1000, 1.0, 0.5), (4000, 4.0, 8.0)]
    return [
        Probed(tokens, lin, att, 1e9, tokens * 1e6, a * lin + b * att, 1e9 + beyond + grows * tokens * 1e6)
        for tokens, lin, att in estimates
    ]


def test_two_rows_tell_matrices_from_attention() -> None:
    """A slow attention that is read as slow matrices, and so vanishes from the plan of a longer row."""
    gpu, lines = correction(H100, rows(2.0, 0.5, 1.5, 3e8))
    assert gpu.measured is not None
    assert gpu.measured.linear == pytest.approx(0.49 / 2)
    assert gpu.measured[1:3] == pytest.approx((0.60 / 0.5, 0.51 / 0.5))
    assert gpu.measured.activations == pytest.approx(1.5) and gpu.workspace == pytest.approx(3e8)
    assert "2.00" in lines[0] and "0.50" in lines[0] and "1.50" in lines[1]


def test_noise_is_not_taken_for_a_rate() -> None:
    """A negative rate of attention, of which two close measurements make one, and memory that shrinks."""
    gpu, lines = correction(H100, rows(2.0, -0.2, -1.0, 0.0))
    assert gpu.measured is not None and "all of it" in lines[0] and "left as estimated" in lines[1]
    assert gpu.measured.linear / 0.49 == pytest.approx(gpu.measured.forward / 0.60)
    assert gpu.measured.activations == 1.0 and gpu.workspace >= 0
    short = [row._replace(attention=row.attention / 1000) for row in rows(2.0, 1.0, 1.0, 0.0)]
    assert "too small" in correction(H100, short)[1][0]


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of a CPU that nobody measured, or of several where there is one."""
    for name, size in (("SQUARE", 128), ("COPIED", 1 << 16), ("ROWS", 64), ("MOST_ROWS", 128)):
        monkeypatch.setattr(machine, name, size)
    assert parse_gpus("cpu").num == 1 and "cpu" not in GPUS
    for wrong in ("2xcpu", "2x2xcpu"):
        with pytest.raises(ArgumentError, match="one machine"):
            parse_gpus(wrong)
    for lora in (None, Adapters(4, targets=("q", "down"))):
        gpu = measured_cpu(SMALL, lora)
        assert gpu.flops > 1e8 and gpu.memory > 1e8 and gpu.measured is not None
        assert all(0 < share < 100 for share in gpu.measured[:3])
        # What this process holds, of which torch alone is more than 50 MB.
        assert 5e7 < gpu.workspace < 1e11
    with pytest.raises(ArgumentError, match="nothing to measure"):
        measured_cpu(SMALL._replace(heads=0, kv_heads=0))


def test_memory_of_a_machine_without_proc_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS says bytes where Linux says kibibytes: a thousand times what was used went into the plan."""

    def nothing(path: Path, **_: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "read_text", nothing)
    monkeypatch.setattr(sys, "platform", "darwin")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert most <= probing._peak() < 100 * most
