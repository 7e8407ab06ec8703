"""Commands and options that the pages write are there: a page is copied from, line by line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from longspan.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
GENERATED = {"config-reference.md"}


def command_lines(text: str) -> list[str]:
    """Return what stands behind `longspan` in code, without what a reader fills in."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    lines += [
        " ".join(each.split())
        for each in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    ]
    found = []
    for line in lines:
        line = re.sub(r"\s#\s.*$", "", line).strip()
        match = re.match(r"(?:[A-Z_]+=\S+ |torchrun .*?-m |\$ )?longspan ([a-z].*)$", line)
        if match:
            found.append(match[1])
    return found


@pytest.fixture(scope="module")
def root():
    return typer.main.get_command(app)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name
)
def test_commands_and_options_exist(page: Path, root) -> None:
    """An option that was renamed stays on a page and fails the reader who copies it."""
    wrong = []
    for line in command_lines(page.read_text(encoding="utf-8")):
        try:
            words = shlex.split(line)
        except ValueError:
            wrong.append(f"{line}: quotes")
            continue
        words = words[: next((at for at, word in enumerate(words) if word in ("|", "&&", ">", ";")), None)]
        command = root
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            name = words.pop(0)
            if name not in command.commands:
                if not re.fullmatch(r"[A-Z.]+|\.\.\.", name):
                    wrong.append(f"{line}: no command {name}")
                break
            command = command.commands[name]
        else:
            known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
            known |= {"--help", "-h", "--version"}
            given = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
            wrong += [f"{line}: no option {option}" for option in given if option not in known]
    assert not wrong


def test_the_scan_sees_commands() -> None:
    """Guard against the test above passing because it finds nothing."""
    found = command_lines(
        "```\nlongspan data mix S --mode x   # why\n```\nwith `longspan plan M --context\n8k`."
    )
    assert found == ["data mix S --mode x", "plan M --context 8k"]
    assert len(command_lines((ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8"))) > 20
