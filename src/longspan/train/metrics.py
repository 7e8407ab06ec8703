"""What is recorded of a step: loss by source, position and document length; speed, FLOPs and memory."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PretrainedConfig

from longspan.core.errors import DataError
from longspan.data.rows.loader import PackedRow
from longspan.models.shape import model_shape
from longspan.plan.hardware import gpu_named
from longspan.plan.models import ModelShape
from longspan.train.batch import IGNORE_LABEL, Batch

FIRST_BUCKET = 128


class LossBreakdown:
    """Sums of per-token loss by source, and by buckets (0-128, 128-256, 256-512, ... tokens) of position and length."""

    def __init__(self) -> None:
        self._by_source: dict[str, tuple[float, int]] = {}
        self._by_position: dict[int, tuple[float, int]] = {}
        self._by_length: dict[int, tuple[float, int]] = {}
        self._kl: dict[str, tuple[float, int]] = {}

    def add(self, batch: Batch, nll: torch.Tensor, kl: torch.Tensor | None = None) -> None:
        """Count a micro-batch, all on the host; `nll` fp32 [N] is unweighted, tokens without label do not count.

        `kl` fp32 [N]: divergence from a teacher; tokens without one do not count in its mean.
        """
        if kl is not None and batch.teacher is not None:
            taught = (batch.labels != IGNORE_LABEL) & (batch.teacher.logprobs[:, 0] > -torch.inf)
            _add(self._kl, {"kl": (float(kl[taught].double().sum()), int(taught.sum()))})
        labelled = batch.labels != IGNORE_LABEL
        values = nll[labelled].double()
        self._count(self._by_source, batch.sources[labelled], values, list(batch.source_names))
        # Position p is the number of tokens the prediction of token p + 1 may look back on, less one.
        self._count(self._by_position, _buckets(batch.positions[labelled]), values, None)
        if batch.lengths is not None:
            # A document of 128 tokens, whose last position is 127, is in the first bucket.
            self._count(self._by_length, _buckets(batch.lengths[labelled] - 1), values, None)

    @staticmethod
    def _count(into: dict, keys: torch.Tensor, values: torch.Tensor, names: list[str] | None) -> None:
        if not len(keys):
            return
        counts = torch.bincount(keys).tolist()
        sums = torch.bincount(keys, weights=values).tolist()
        counted = {
            names[index] if names is not None else index: (total, count)
            for index, (count, total) in enumerate(zip(counts, sums))
            if count
        }
        _add(into, counted)

    def join(self, other: LossBreakdown) -> None:
        """Count what another rank counted."""
        _add(self._by_source, other._by_source)
        _add(self._by_position, other._by_position)
        _add(self._by_length, other._by_length)
        _add(self._kl, other._kl)

    def by_source(self) -> dict[str, float]:
        """Return the mean loss of each source, in nats a token."""
        return {name: total / count for name, (total, count) in sorted(self._by_source.items())}

    def by_position(self) -> dict[str, float]:
        """Return the mean loss of each bucket of positions in the document, keyed `start-end`."""
        return _means(self._by_position)

    def by_length(self) -> dict[str, float]:
        """Return the mean loss of each bucket of document lengths, as cut in the row, keyed `start-end`."""
        return _means(self._by_length)

    def kl(self) -> float | None:
        """Return the mean divergence from the teacher, in nats a token; None where there is none."""
        total, count = self._kl.get("kl", (0.0, 0))
        return total / count if count else None

    def total(self) -> tuple[float, int]:
        """Return the sum over all labels, in nats, and their number."""
        return (
            sum(total for total, _ in self._by_source.values()),
            sum(count for _, count in self._by_source.values()),
        )


class StepFlops:
    """Floating-point operations that a model needs for the rows of a step, and its share of the peak.

    Recomputation is not counted, nor the half of causal attention that is masked. Beside frozen weights no weight
    gradients are needed: two forward passes instead of three for the matrices.

    Args:
        config: the model's configuration; where `models.shape` knows no estimate nothing is said.
        frozen: whether most weights are frozen.
        device: whose peak is meant; known for the GPUs of `plan.hardware`.
        num_devices: devices that share a step.
    """

    def __init__(
        self, config: PretrainedConfig, *, frozen: bool, device: torch.device, num_devices: int
    ) -> None:
        self._shape: ModelShape | None = None
        with contextlib.suppress(DataError):
            self._shape = model_shape(config)
        self._passes = 2 if frozen else 3
        self._num_devices = num_devices
        gpu = gpu_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = None if gpu is None else gpu.flops

    def of(self, rows: Sequence[PackedRow]) -> float | None:
        """Return the FLOPs of a step on `rows`; None where the model's are not known."""
        if self._shape is None:
            return None
        tokens = sum(len(row.input_ids) for row in rows)
        lengths = np.concatenate([np.diff(row.cu_seqlens) for row in rows]).astype(np.float64)
        first = np.concatenate([row.first_positions for row in rows]).astype(np.float64)
        # A branch attends to all that it follows, which attends once.
        ends = self._shape.attention_flops(first + lengths)
        attention = float((ends - self._shape.attention_flops(first)).sum())
        return self._passes * tokens * self._shape.linear_flops() + 3 * attention

    def rates(self, rows: Sequence[PackedRow], seconds: float) -> tuple[float | None, float | None]:
        """Return TFLOP/s a device and the model FLOPs utilisation (0 to 1); None for what is not known."""
        flops = self.of(rows)
        if flops is None:
            return None, None
        rate = flops / seconds / self._num_devices
        return round(rate / 1e12, 6), None if self._peak is None else round(rate / self._peak, 4)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held since the last call on a GPU; on the CPU by this process since it began."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return held
    # Kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _buckets(positions: torch.Tensor) -> torch.Tensor:
    """Return the bucket of each position: 0 below FIRST_BUCKET, then one for each doubling."""
    buckets = (positions // FIRST_BUCKET).clamp(min=0)
    return torch.where(buckets > 0, buckets.double().log2().floor().long() + 1, 0)


def _means(counted: dict[int, tuple[float, int]]) -> dict[str, float]:
    return {_bucket_name(bucket): total / count for bucket, (total, count) in sorted(counted.items())}


def _add(into: dict, counted: dict) -> None:
    for key, (total, count) in counted.items():
        before = into.get(key, (0.0, 0))
        into[key] = (before[0] + total, before[1] + count)


def _bucket_name(bucket: int) -> str:
    start = 0 if bucket == 0 else FIRST_BUCKET * 2 ** (bucket - 1)
    return f"{start}-{FIRST_BUCKET * 2**bucket}"
