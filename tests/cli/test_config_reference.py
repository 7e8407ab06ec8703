"""The page of all settings says what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "make_config_reference.py"


def test_the_page_is_made_from_the_fields():
    """After a change of a setting: python docs/make_config_reference.py"""
    specification = importlib.util.spec_from_file_location("make_config_reference", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    made = module.page()
    assert made == module.PAGE.read_text(encoding="utf-8")
    for part in (
        "| `num_needles` | whole number | `1` |",
        "## ServerConfig",
        "[StreamConfig](#streamconfig)",
    ):
        assert part in made


def test_settings_in_tokens_are_read_as_lengths_or_budgets() -> None:
    """`2k` was 2,000 tokens to one command, 2,048 to another, and refused by a third."""
    rows = re.findall(
        r"^\| `(\w*(?:tokens|length|stride))` \| whole number",
        SCRIPT.with_name("config-reference.md").read_text(),
        re.M,
    )
    assert rows == ["shingle_tokens"], "a length is core.config.Length, a budget TokenBudget"
