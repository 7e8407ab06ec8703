"""Numbers with units: read exactly, written with three digits, refused with the allowed forms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError
from longspan.core.units import (
    format_bytes,
    format_count,
    format_seconds,
    parse_count,
    parse_length,
    parse_tokens,
)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_length, "4096", 4096),
        (parse_length, 4096, 4096),
        (parse_length, "128k", 131072),
        (parse_length, "128K", 131072),
        (parse_length, " 1M ", 2**20),
        (parse_length, "1,024", 1024),
        (parse_length, "0.5k", 512),
        (parse_tokens, "100m", 100_000_000),
        (parse_tokens, "1.5B", 1_500_000_000),
        (parse_tokens, "5b", 5_000_000_000),
        (parse_tokens, "2e9", 2_000_000_000),
        (parse_tokens, "20_000", 20_000),
        (parse_tokens, "1,500,000", 1_500_000),
        (parse_count, "2e6", 2_000_000),
        (parse_count, "2M", 2_000_000),
        (parse_count, 7, 7),
    ],
)
def test_parse(parse, text, value):
    assert parse(text) == value


def test_context_lengths_are_binary_and_budgets_decimal():
    """The same "k" means 1024 for a window and 1000 for a budget; mixing them up shifts every window."""
    assert parse_length("8k") == 8192
    assert parse_tokens("8k") == 8000


def test_decimal_fractions_are_exact():
    """1.005 * 1000 is 1004.9999999999999 in floating point, which was refused as "not a whole number"."""
    assert parse_tokens("1.005k") == 1005
    assert parse_tokens(2**53 + 1) == 2**53 + 1


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "12q", "1.5.2", "NaN", "inf", "1e400", "9e99", "1k k", True, None]
)
def test_nonsense_is_refused_with_examples(text):
    with pytest.raises(ArgumentError, match="allowed: "):
        parse_tokens(text)


def test_decimal_comma_is_refused():
    """ "1,5B" was read as 15B: half of its readers mean one and a half."""
    with pytest.raises(ArgumentError):
        parse_tokens("1,5B")


def test_part_of_a_token_is_refused():
    with pytest.raises(ArgumentError, match="whole number"):
        parse_length("0.3")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (987, "987"),
        (9999, "9,999"),
        (12_345, "12.3K"),
        (1_640_000, "1.64M"),
        (5_000_000_000, "5.00B"),
        (0.125, "0.125"),
        (1234.5, "1,234"),
        (-12_345, "-12.3K"),
        (float("inf"), "inf"),
    ],
)
def test_format_count(value, text):
    assert format_count(value) == text


def test_rounding_up_moves_to_the_next_unit():
    """999,999 was written "1e+03K", 999.7 MiB "1e+03 MiB" and 59.97 seconds "60.0 s"."""
    assert format_count(999_999) == "1.00M"
    assert format_bytes(999.7 * 2**20) == "0.98 GiB"
    assert format_seconds(59.97) == "1 min 00 s"
    assert format_seconds(3599.7) == "1 h 00 min"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1000, "1000 B"), (306 * 2**20, "306 MiB"), (80 * 2**30, "80.0 GiB")]
)
def test_format_bytes(value, text):
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(8.2, "8.2 s"), (205, "3 min 25 s"), (7500, "2 h 05 min"), (90_000, "25 h 00 min")]
)
def test_format_seconds(value, text):
    assert format_seconds(value) == text


@settings(max_examples=200, deadline=None)
@given(st.floats(min_value=0, max_value=9e14))
def test_formatted_counts_have_no_exponent_and_stay_close(value):
    text = format_count(value)
    if value >= 1e-4:
        assert "e" not in text
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1)
    shown = float(text.rstrip("KMBT").replace(",", "")) * scale
    assert shown == pytest.approx(value, rel=0.006, abs=0.5 if value >= 100 else 1e-3)


@settings(max_examples=100, deadline=None)
@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_whole_numbers_come_back(value):
    assert parse_tokens(value) == parse_tokens(str(value)) == parse_tokens(f"{value:,}") == value
