"""Docs point to what is there: files that exist, and settings that have these names."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import longspan

ROOT = Path(longspan.__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


def links_of(page: Path) -> list[tuple[str, Path]]:
    """Return text and target of every link of a page to a file."""
    found = LINK.findall(page.read_text(encoding="utf-8"))
    return [(text, page.parent / target) for text, target in found if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    """A file that is renamed must not leave a page pointing to nothing."""
    missing = [str(target) for _, target in links_of(page) if not target.exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_package_that_are_named_exist(page: Path) -> None:
    """`eval/ppl.py` in running text is a signpost as well."""
    rooms = "|".join(path.name for path in (ROOT / "src" / "longspan").iterdir() if path.is_dir())
    named = re.findall(
        rf"(?<![\w./-])((?:src/longspan/|tests/)?(?:{rooms})/[\w/]+\.(?:py|yaml))", page.read_text("utf-8")
    )
    missing = [
        name
        for name in named
        if not any((ROOT / base / name).exists() for base in ("", "src/longspan", "tests"))
    ]
    assert not missing


def test_the_tests_that_the_documentation_names_are_there() -> None:
    """A claim that rests on a test of another name rests on nothing."""
    text = (ROOT / "docs" / "line-by-line.md").read_text(encoding="utf-8")
    named = re.findall(r"(\w+/test_\w+\.py|theirs)(?:::(test_\w+))?", text.replace("cli/test_theirs.py", ""))
    for place, test in named:
        path = ROOT / "tests" / place.replace("theirs", "cli/test_theirs.py")
        assert path.is_file() and (not test or f"def {test}(" in path.read_text(encoding="utf-8")), (
            place,
            test,
        )
    assert len(named) > 100


def test_settings_of_the_glossary_exist() -> None:
    """A renamed field leaves a word of the glossary without its setting."""
    settings = [
        (text.strip("`"), target)
        for text, target in links_of(ROOT / "docs" / "glossary.md")
        if text[0] == "`"
    ]
    assert len(settings) > 15
    for name, file in settings:
        owner, field = name.split(".")
        classes = {
            node.name: node
            for node in ast.parse(file.read_text("utf-8")).body
            if isinstance(node, ast.ClassDef)
        }
        fields = {item.target.id for item in classes[owner].body if isinstance(item, ast.AnnAssign)}  # type: ignore[union-attr]
        assert field in fields, f"{name} is not in {file}"


def test_every_extra_is_explained() -> None:
    """A reader who lacks a package has to learn what to install before a command says so."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    rows = re.findall(r"^\| ([^|]*) \|", (ROOT / "docs" / "index.md").read_text("utf-8"), re.M)
    assert extras.keys() - {"dev"} == set(re.findall(r"`([a-z0-9]+)`", " ".join(rows)))


def test_every_room_has_a_row() -> None:
    """A room that the page of rooms leaves out is found by nobody."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = set(re.findall(r"^\| `([a-z_]+)/` \|", text.partition("## Imports")[0], re.M))
    rooms = {path.parent.name for path in (ROOT / "src" / "longspan").glob("*/__init__.py")}
    assert rows - {"recipes"} == rooms - {"recipes"}
