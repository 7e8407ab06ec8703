"""What a stage leaves out of its data: counted where it is planned, said before training and in the dry run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from longspan.core.log import get_logger
from longspan.data.plans.packing import PAD_DOCUMENT, PackPlan
from longspan.data.rows.loader import Order, RowLoader, RowSource
from longspan.data.store.lengths import LengthTable

WORDS = {
    "unwanted": "{} documents that do not fulfil the condition",
    "short": "{} documents too short",
    "long": "{} documents too long",
    "short_rows": "{} rows too short",
    "heads": "{} documents of which the head is kept",
    "overflow_tokens": "{} tokens behind those heads",
    "tail_tokens": "{} tokens behind the last row",
    "cut_documents": "{} documents cut",
    "cut_chats": "{} conversations cut (answers apart from their questions)",
    "rest_rows": "{} rows that fill no step",
    "rest_tokens": "{} tokens in those rows",
}
"""What a stream can leave out, or cut."""


def left_out_words(counts: Mapping[str, int | None]) -> str:
    """Return what a stream leaves out, in words; "" where it is nothing."""
    return ", ".join(words.format(f"{counts[kind]:,}") for kind, words in WORDS.items() if counts.get(kind))


def log_left_out(stage: str, left_out: Mapping[str, Mapping[str, int]]) -> None:
    """Say what each stream of a stage leaves out of its data."""
    for name, counts in left_out.items():
        words = left_out_words(counts)
        if words:
            get_logger("train").info("stage %s, stream %s: left out: %s", stage, name, words)


def num_cut(plan: PackPlan, lengths: LengthTable, chats: np.ndarray) -> int:
    """Return how many conversations the rows cut; `chats` bool [stores] says which stores hold conversations."""
    cut = np.unique(np.asarray(plan.span_document)[np.asarray(plan.span_start) > 0])
    return int(chats[lengths.store[cut]].sum())


def rest_of_epochs(rows: RowSource, order: Order, needed: int, epochs: float) -> dict[str, int]:
    """Return the rows of so many epochs that no step reads, and the tokens in them where it is known which they are."""
    rest = max(0, int(rows.num_rows * epochs) - needed)
    if rest == 0 or epochs != 1 or order == "shuffled" or not isinstance(rows, RowLoader):
        return {"rest_rows": rest}
    plan = rows.plan
    first = int(plan.row_offsets[needed])
    real = np.asarray(plan.span_document[first:]) != PAD_DOCUMENT
    return {"rest_rows": rest, "rest_tokens": int(np.asarray(plan.span_tokens[first:])[real].sum())}
