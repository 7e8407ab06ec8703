"""The public surface equals written lists: a name or an option changes only on purpose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import longspan
from longspan.cli.main import app
from tests.patience import PATIENCE_SECONDS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def commands(group, path: tuple[str, ...] = ()):
    """Yield (path, command) of every command, groups included."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


def shown(command):
    """Return the arguments and options that help shows."""
    return [each for each in command.params if not getattr(each, "hidden", False)]


def test_public_names_equal_the_list():
    written = (HERE / "public_names.txt").read_text().split()
    assert longspan.__all__ == written
    assert written == sorted(written)
    assert set(written) <= set(dir(longspan))


def test_renamed_public_names_still_work_and_say_the_new_one():
    """Code written against the old names must not break before the next release."""
    with pytest.warns(DeprecationWarning, match="longspan.PackConfig now"):
        assert longspan.PackSpec is longspan.PackConfig
    with pytest.warns(DeprecationWarning, match="longspan.MixtureConfig now"):
        assert longspan.MixtureSpec is longspan.MixtureConfig


def test_public_names_are_there():
    """The names are imported on first use; each must really exist in its room and say what it is."""
    for name in longspan.__all__:
        assert getattr(longspan, name).__doc__, name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'train_models'"):
        _ = longspan.train_models


def test_command_options_equal_the_list():
    """To change it on purpose, copy what this test prints into cli_options.txt."""
    lines = []
    for path, command in sorted(COMMANDS.items()):
        names = [
            "/".join([*parameter.opts, *parameter.secondary_opts])
            if parameter.param_type_name == "option"
            else (parameter.metavar or parameter.name.upper())
            for parameter in shown(command)
        ]
        lines.append(" ".join([*path, *sorted(names, key=lambda name: (name.startswith("-"), name))]))
    found = "\n".join(lines) + "\n"
    print(found)
    assert found == (HERE / "cli_options.txt").read_text()


def test_options_of_the_last_release_are_still_accepted():
    """Scripts say the old names; each still works, hidden from help."""
    lost = []
    for line in (HERE / "cli_options_before.txt").read_text().splitlines():
        words = [word for word in line.split() if not word.isupper() and "|" not in word]
        path = tuple(word for word in words if not word.startswith("--"))
        accepted = {name for each in COMMANDS[path].params for name in (*each.opts, *each.secondary_opts)}
        old = {name for word in words if word.startswith("--") for name in word.split("/")}
        lost += [f"{' '.join(path)} {name}" for name in sorted(old - accepted)]
    assert not lost


def test_functions_of_commands_are_short():
    """A command that carries forty options by hand is where the next option is forgotten."""
    import ast

    for path in (ROOT / "src" / "longspan" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 80, f"{path.name}: {node.name} has {lines} lines"


@pytest.mark.parametrize(
    "path", [path for path, command in COMMANDS.items() if not hasattr(command, "commands")]
)
def test_every_command_explains_itself(path):
    """Each command says what it does, each option what it means, and the help ends with an example."""
    command = COMMANDS[path]
    assert command.help and command.help[0].isupper()
    assert "Example:" in command.epilog
    assert f"longspan {' '.join(path)}" in command.epilog
    for parameter in shown(command):
        assert parameter.help, f"{path}: {parameter.name} has no help"


def shown_command_lines() -> list[tuple[str, list[str]]]:
    """Return (file, words) of each `longspan ...` line in the code blocks of the documentation."""
    found = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        inside = False
        for line in path.read_text(encoding="utf-8").splitlines():
            inside ^= line.startswith("```")
            words = line.partition("#")[0].split()
            if inside and words[:1] == ["longspan"] and len(words) > 1:
                found.append((path.name, words[1:]))
    return found


def test_documentation_shows_commands_that_exist():
    """A command line in the README that the program refuses is worse than none."""
    lines = shown_command_lines()
    for name, words in lines:
        path = next((tuple(words[:n]) for n in (2, 1) if tuple(words[:n]) in COMMANDS), None)
        assert path is not None, f"{name}: longspan {' '.join(words)}"
        known = {
            option
            for parameter in shown(COMMANDS[path])
            for option in (*parameter.opts, *parameter.secondary_opts)
        } | {"--help"}
        unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - known
        assert not unknown, f"{name}: longspan {' '.join(path)} has no {unknown}"
    assert len(lines) > 5


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "longspan", "--version"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.stdout == f"longspan {longspan.__version__}\n"


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert version("longspan") == longspan.__version__
