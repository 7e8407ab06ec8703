"""Loss by source and by position in the document, gathered over one optimizer step."""

from __future__ import annotations

import torch

from longspan.train.batch import IGNORE, Batch

FIRST_BUCKET = 128


class LossBreakdown:
    """Sums of per-token loss by source and by position bucket (0-128, 128-256, 256-512, ... tokens)."""

    def __init__(self) -> None:
        self._by_source: dict[str, tuple[float, int]] = {}
        self._by_position: dict[int, tuple[float, int]] = {}

    def add(self, batch: Batch, nll: torch.Tensor) -> None:
        """Count a micro-batch; `nll` fp32 [N] is unweighted, tokens without label do not count."""
        labelled = batch.labels != IGNORE
        values = nll[labelled].double()
        self._count(self._by_source, batch.sources[labelled], values, list(batch.source_names))
        # Position p is the number of tokens the prediction of token p + 1 may look back on, less one.
        positions = batch.positions[labelled]
        buckets = (positions // FIRST_BUCKET).clamp(min=0)
        buckets = torch.where(buckets > 0, buckets.double().log2().floor().long() + 1, 0)
        self._count(self._by_position, buckets, values, None)

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

    def by_source(self) -> dict[str, float]:
        """Return the mean loss of each source, in nats a token."""
        return {name: total / count for name, (total, count) in sorted(self._by_source.items())}

    def by_position(self) -> dict[str, float]:
        """Return the mean loss of each position bucket, keyed `start-end`."""
        return {
            _bucket_name(bucket): total / count
            for bucket, (total, count) in sorted(self._by_position.items())
        }


def _add(into: dict, counted: dict) -> None:
    for key, (total, count) in counted.items():
        before = into.get(key, (0.0, 0))
        into[key] = (before[0] + total, before[1] + count)


def _bucket_name(bucket: int) -> str:
    start = 0 if bucket == 0 else FIRST_BUCKET * 2 ** (bucket - 1)
    return f"{start}-{FIRST_BUCKET * 2**bucket}"
