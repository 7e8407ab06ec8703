"""Errors: one readable message, an exit code, and a round trip through another process."""

from __future__ import annotations

import pickle  # noqa: TID251 - what multiprocessing uses to bring an exception home

import pytest

from longspan.core.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    LongspanError,
    MissingDependencyError,
    RunError,
    UserError,
)


def test_message_says_what_found_allowed_and_how_to_mend_it():
    error = DataError("the mode is unknown", found="fast", allowed=["global", "none"], fix="use --mode none")
    assert str(error) == (
        "the mode is unknown\n  found: fast\n  allowed: global, none\n  to mend it: use --mode none"
    )


def test_falsy_findings_are_said():
    """`found=0` and `found=""` are findings; only None means that there is nothing to say."""
    assert str(DataError("bad", found=0)) == "bad\n  found: 0"


def test_sets_are_listed_in_order():
    """A set prints in another order in every process; messages must not."""
    assert "allowed: a, b, c" in str(DataError("bad", allowed={"c", "a", "b"}))


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ArgumentError, 2),
        (ConfigError, 2),
        (DataError, 2),
        (MissingDependencyError, 2),
        (RunError, 1),
        (LongspanError, 1),
    ],
)
def test_exit_codes(kind, code):
    assert kind("x").exit_code == code
    assert issubclass(kind, UserError) == (code == 2)


def test_errors_survive_the_way_back_from_a_worker():
    """multiprocessing pickles what a worker raises; a constructor with extra arguments often breaks that."""
    error = DataError("bad line", found="3", fix="remove it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DataError
    assert str(again) == str(error)
