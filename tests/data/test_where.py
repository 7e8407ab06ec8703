"""Conditions on documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError
from longspan.data.plans.where import documents_where, names_in

COLUMNS = {
    "near_duplicate": np.array([0, 1, 0, 0], np.uint8),
    "long_range": np.array([0.1, 0.2, np.nan, 0.0], np.float32),
    "language": np.array(["en", "de", "", "en"]),
    "tokens": np.array([10, 20, 30, 40], np.uint32),
}


@pytest.mark.parametrize(
    ("text", "documents", "unknown"),
    [
        ("near_duplicate == 0", [0, 2, 3], {}),
        ("near_duplicate == 0 and long_range > 0.02", [0], {"long_range": 1}),
        ("near_duplicate == 0 and (long_range > 0.02 or not known(long_range))", [0, 2], {"long_range": 1}),
        ("language == 'en' or tokens >= 30", [0, 2, 3], {"language": 1}),
        ("language != 'en'", [1], {"language": 1}),
        ("10 < tokens <= 30", [1, 2], {}),
        ("not 10 < tokens <= 30", [0, 3], {}),
        ("long_range > -0.5", [0, 1, 3], {"long_range": 1}),
    ],
)
def test_conditions(text: str, documents: list[int], unknown: dict[str, int]) -> None:
    """Guards against missing values that fulfil a comparison, as NaN != 1 does."""
    chosen = documents_where(text, COLUMNS, 4)
    assert np.flatnonzero(chosen.fulfils).tolist() == documents
    assert chosen.unknown == unknown


@pytest.mark.parametrize(
    "text",
    [
        "", "tokens", "tokens >", "tokens = 5", "tokens + 1 > 2", "tokens.sum() > 1", "__import__('os') == 1",
        "tokens is 5", "tokens in (1, 2)", "[t for t in tokens] == 1", "known(1)", "known(tokens, tokens)",
        "f'{tokens}' == 1", "True == 1", "lambda: 1", "tokens > 1 if tokens else 2",
        "(" * 300 + "tokens > 1" + ")" * 300,
    ],
)  # fmt: skip
def test_what_is_no_condition_is_refused(text: str) -> None:
    """Guards against text of a recipe that is run as Python."""
    with pytest.raises(ConfigError, match="not a condition"):
        documents_where(text, COLUMNS, 4)


def test_names_and_kinds_that_do_not_fit_are_named() -> None:
    """Guards against a traceback of numpy."""
    with pytest.raises(ConfigError, match=r"not known of the documents.*\n.*boilerplate"):
        documents_where("boilerplate < 0.5", COLUMNS, 4)
    with pytest.raises(ConfigError, match="a number with a word"):
        documents_where("language > 3", COLUMNS, 4)
    assert names_in("known(tokens) and 'a' == language") == {"tokens", "language"}


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="tokens <>=!()andort0159.'\n_", max_size=40))
def test_any_text_is_a_condition_or_refused(text: str) -> None:
    """Guards against crashes of the reader."""
    try:
        chosen = documents_where(text, COLUMNS, 4)
    except ConfigError:
        return
    assert chosen.fulfils.shape == (4,)
