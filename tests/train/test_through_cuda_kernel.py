"""Tests of chunks, packed rows and answers a second time, through the CUDA kernel and its operators' rules.

The models are in fp32, and so are the operators here: the limits of the tests hold unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.flash_operators import calls, flash_operators
from tests.infer.test_engine import test_the_library_gives_the_same_answers
from tests.models.test_attention import test_several_new_tokens_after_a_cache
from tests.train.test_recurrent import (
    batch_of,
    check_equal,
    model_of,
    test_equals_on_other_models,
    test_equals_the_row_at_once,
)

__all__ = [
    "test_equals_on_other_models",
    "test_equals_the_row_at_once",
    "test_several_new_tokens_after_a_cache",
    "test_the_library_gives_the_same_answers",
]


@pytest.fixture(autouse=True)
def _through_the_operators() -> Iterator[None]:
    with flash_operators(wide=True):
        yield
        assert calls, "the operators were never called"


def test_a_window_over_the_end_of_a_chunk() -> None:
    """Five keys that a chunk leaves to a window with 28 queries: pairs were lost, and merging made NaN."""
    model = model_of(model_type="mistral", sliding_window=24)
    check_equal(model, batch_of([0, 28, 120]), chunk_tokens=33)
