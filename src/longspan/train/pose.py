"""PoSE: short rows whose positions reach as far as a long context (arXiv:2309.10400, section 3).

Each document is cut into chunks, and before every chunk but the first some positions are skipped, so that over many
documents every distance within the target length occurs. With rows of 6 and a target of 20, two chunks:

    tokens       a b c | d e f
    positions    0 1 2 | 11 12 13      8 positions were skipped

The attention still sees the tokens one after another; only RoPE sees the gaps.
"""

from __future__ import annotations

import numpy as np

from longspan.core.seeds import rng
from longspan.data.rows.loader import PackedRow
from longspan.train.config import PoseConfig

__all__ = ["skip_positions"]


def skip_positions(row: PackedRow, pose: PoseConfig, *, seed: int, stage: str, number: int) -> PackedRow:
    """Return the row with positions of its own; they are a function of seed, stage and the row's `number`.

    A document of fewer tokens than chunks counts on as usual.
    """
    generator = rng(seed, "pose", stage, number)
    positions = np.empty(len(row.input_ids), np.int64)
    for start, end in zip(row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist()):
        positions[start:end] = document_positions(generator, end - start, pose)
    return row._replace(positions=positions)


def document_positions(generator: np.random.Generator, length: int, pose: PoseConfig) -> np.ndarray:
    """Return the positions of one document: they rise, stay below the target, and begin at 0."""
    positions = np.arange(length)
    if length < pose.chunks or length >= pose.target_length:
        return positions
    borders = np.sort(generator.choice(np.arange(1, length), pose.chunks - 1, replace=False))
    # Skips before chunks 1, 2, ...: in all at most what the target has more than the document.
    skipped = np.sort(generator.integers(0, pose.target_length - length + 1, pose.chunks - 1))
    for border, before, after in zip(borders, np.concatenate([[0], skipped[:-1]]), skipped):
        positions[border:] += after - before
    return positions
