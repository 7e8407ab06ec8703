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

    A document of fewer tokens than chunks counts on as usual. Of documents that branch, what they share is cut, so
    each branch has the positions that it would have as a document of its own.
    """
    generator = rng(seed, "pose", stage, number)
    borders = row.cu_seqlens.tolist()
    follows = row.follows
    longest = _longest_paths(np.diff(row.cu_seqlens), follows)
    paths: list[np.ndarray] = []
    for (parent, place), start, end, reach in zip(follows.tolist(), borders, borders[1:], longest.tolist()):
        if parent < 0:
            paths.append(document_positions(generator, end - start, pose, reach=reach))
        else:
            before = paths[parent][:place]
            behind = before[-1] + 1 if place else 0
            paths.append(np.concatenate([before, behind + np.arange(end - start)]))
    own = [path[len(path) - (end - start) :] for path, start, end in zip(paths, borders, borders[1:])]
    return row._replace(positions=np.concatenate(own))


def _longest_paths(lengths: np.ndarray, follows: np.ndarray) -> np.ndarray:
    """Return the tokens of the longest path through each part, [parts]; a branch stands behind what it follows."""
    longest = lengths + follows[:, 1]
    for part in range(len(longest) - 1, -1, -1):
        parent = follows[part, 0]
        if parent >= 0:
            longest[parent] = max(longest[parent], longest[part])
    return longest


def document_positions(
    generator: np.random.Generator, length: int, pose: PoseConfig, *, reach: int | None = None
) -> np.ndarray:
    """Return the positions of one document: they rise, stay below the target, and begin at 0.

    `reach` is the tokens of the document and of its longest branch, which stays below the target too. None: none
    branches off.
    """
    reach = length if reach is None else reach
    positions = np.arange(length)
    if length < pose.chunks or reach >= pose.target_length:
        return positions
    borders = np.sort(generator.choice(np.arange(1, length), pose.chunks - 1, replace=False))
    # Skips before chunks 1, 2, ...: in all at most what the target has more than the document.
    skipped = np.sort(generator.integers(0, pose.target_length - reach + 1, pose.chunks - 1))
    for border, before, after in zip(borders, np.concatenate([[0], skipped[:-1]]), skipped):
        positions[border:] += after - before
    return positions
