"""The strategies of packing, by name; see `packing` for what they do.

Another one is an entry more: `STRATEGIES["mine"] = Strategy(cut_to_rows, join=rows_of_pieces)`.
"""

from __future__ import annotations

from longspan.data.plans.best_fit import best_fit_decreasing
from longspan.data.plans.cutting import cut_to_lengths, cut_to_rows, cut_where_rows_end
from longspan.data.plans.pack_config import STRATEGIES, PackConfig, Strategy


def check_split(spec: PackConfig) -> None:
    """Raise ValueError for settings with which documents cannot be cut into pieces of listed lengths."""
    lengths = spec.split_lengths
    if not lengths or list(lengths) != sorted(set(lengths), reverse=True):
        raise ValueError("split needs split_lengths, longest first, such as [64k, 8k]")
    if any(spec.length % length for length in lengths):
        raise ValueError(f"split_lengths {list(lengths)} do not all divide a row of {spec.length}")
    if spec.overlap or spec.min_tail > 1:
        raise ValueError("split has no overlap and no min_tail: its shortest piece is the smallest tail")
    if lengths[-1] <= spec.num_mos:
        raise ValueError("the shortest of split_lengths has no room for a token behind mos_id")
    if spec.piece_length is not None and spec.piece_length not in lengths:
        raise ValueError(f"piece_length {spec.piece_length} is not one of split_lengths {list(lengths)}")


STRATEGIES |= {
    "concat": Strategy(
        cut_where_rows_end, flows=True, remainders=("drop", "pad", "drop_last"), overlaps_across=True
    ),
    "intact": Strategy(cut_to_rows),
    # Most of its rows are a little short of full: dropping those would drop nearly everything.
    "best_fit": Strategy(cut_to_rows, join=best_fit_decreasing, remainders=("pad",)),
    "split": Strategy(cut_to_lengths, flows=True, by_lengths=True, check=check_split),
}
