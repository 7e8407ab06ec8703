"""Shells complete commands and options; the script that does it is printed by --show-completion."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("line", "wanted", "unwanted"),
    [
        ("longspan ev", {"eval"}, {"export"}),
        ("longspan eval pa", {"passkey"}, {"needle"}),
        ("longspan eval passkey --le", {"--lengths"}, {"--depths"}),
        ("longspan data pack --str", {"--strategy"}, set()),
        ("longspan export --pu", {"--push", "--public"}, {"--out"}),
    ],
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_are_completed(longspan, monkeypatch, shell, line, wanted, unwanted):
    """A command line is read by the command that it names alone: to a shell that completes, all had no options."""
    monkeypatch.setenv("_LONGSPAN_COMPLETE", f"complete_{shell}")
    if shell == "bash":
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    else:
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    said = longspan("").out
    for word in wanted:
        assert word in said
    for word in unwanted:
        assert word not in said


def test_the_script_for_a_shell_is_printed(longspan, monkeypatch):
    """Without it a user would have nothing to put into the shell's settings."""
    monkeypatch.setenv("_LONGSPAN_COMPLETE", "source_bash")
    outcome = longspan("")
    assert outcome.code == 0 and "complete -o default" in outcome.out and "longspan" in outcome.out
    monkeypatch.delenv("_LONGSPAN_COMPLETE")
    assert "--show-completion" in longspan("--help").out
