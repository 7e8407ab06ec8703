"""Labels, weights and positions of a batch, on rows that can be checked by eye."""

from __future__ import annotations

import numpy as np
import pytest

from longspan.data.rows.loader import PackedRow
from longspan.train.batch import IGNORE_LABEL, averaged, collate, total_weight
from longspan.train.loop_config import LossAverage


def row(
    ids: list[int], cu: list[int], weights: list[int] | None = None, sources: list[int] | None = None
) -> PackedRow:
    count = len(cu) - 1
    values = {
        "input_ids": np.array(ids, dtype=np.int64),
        "cu_seqlens": np.array(cu, dtype=np.int32),
        "documents": np.arange(count, dtype=np.uint32),
        "sources": np.array(sources or [0] * count, dtype=np.uint16),
        "source_names": ("a", "b"),
        "continuation": np.zeros(count, dtype=bool),
        "weights": None if weights is None else np.array(weights, dtype=np.uint8),
    }
    return PackedRow(**{name: value for name, value in values.items() if name in PackedRow._fields})


def test_labels_never_cross_a_document_or_row_border() -> None:
    """The first token of the next document must not be learnt from the last of this one."""
    batch = collate([row([1, 2, 3, 4, 5], [0, 3, 5]), row([6, 7], [0, 2])])
    assert batch.labels.tolist() == [2, 3, IGNORE_LABEL, 5, IGNORE_LABEL, 7, IGNORE_LABEL]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.loss_weights is None


def test_weights_belong_to_the_predicted_token_not_to_the_predicting_one() -> None:
    """A mask shifted by one trains the wrong tokens: here 3 is masked, so position 1 has no label."""
    batch = collate([row([1, 2, 3, 4], [0, 4], weights=[1, 1, 0, 9])])
    assert batch.labels.tolist() == [2, IGNORE_LABEL, 4, IGNORE_LABEL]
    assert batch.loss_weights is not None
    assert batch.loss_weights.tolist() == [1.0, 0.0, 9.0, 0.0]


def test_the_denominator_is_the_sum_of_the_weights_that_are_used() -> None:
    """Counting a document's first token, which is no label, would make the loss too small."""
    rows = [row([1, 2, 3, 4], [0, 2, 4], weights=[5, 1, 5, 9]), row([6, 7, 8], [0, 3])]
    assert total_weight(rows) == (1 + 9) + 2
    batch = collate(rows)
    assert batch.loss_weights is not None
    assert float(batch.loss_weights.sum()) == total_weight(rows)


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ("tokens", [0, 1, 1, 0, 4, 4, 0, 0]),
        ("samples", [0, 0.5, 0.5, 0, 0.5, 0.5, 0, 0]),
        ("rows", [0, 0.1, 0.1, 0, 0.4, 0.4, 0, 0]),
    ],
)
def test_samples_or_rows_weigh_the_same_whatever_their_tokens(
    over: LossAverage, expected: list[float]
) -> None:
    """A first token that counts as a label makes the mean too small; padding that counts makes it not a number."""
    # Two documents, a prompt token in the second, and padding, a document of its own.
    one = row([1, 2, 3, 4, 5, 6, 0, 0], [0, 3, 6, 8], weights=[7, 1, 1, 0, 4, 4, 0, 0])
    averages = averaged([one], over)[0]
    used = averages.weights.copy()
    used[[0, 3, 6]] = 0
    assert used.tolist() == pytest.approx(expected)
    assert total_weight([averages]) == pytest.approx(sum(expected))
    labels = collate([averages]).labels.tolist()
    assert labels == [2, 3, IGNORE_LABEL, 5, 6, IGNORE_LABEL, IGNORE_LABEL, IGNORE_LABEL]


def test_sources_of_streams_that_number_them_differently_are_kept_apart() -> None:
    """Two streams may both have a source 0 that are not the same source."""
    first = row([1, 2], [0, 2], sources=[1])
    second = row([3, 4], [0, 2], sources=[0])._replace(source_names=("c",))
    batch = collate([first, second])
    assert [batch.source_names[i] for i in batch.sources.tolist()] == ["b", "b", "c", "c"]
