"""What the project hands to others: the site, the metadata, the notes of a release, files for GitHub and Docker."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import longspan

ROOT = Path(longspan.__file__).parents[2]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """A page outside of the navigation, or a link into nothing, would be seen by readers first."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    site = tmp_path / "site"
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "-q", "-d", str(site)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Links to the code lead out of docs/.
    assert "/blob/main/src/longspan/" in (site / "glossary" / "index.html").read_text(encoding="utf-8")


def test_every_public_name_is_on_the_page_of_the_python_interface() -> None:
    """A new piece that is nowhere described would be found by reading the code alone."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    assert described == set(longspan.__all__)


def test_the_version_is_the_same_everywhere() -> None:
    """A wheel of one version that calls itself another in records and citations."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == longspan.__version__ == citation["version"]
    assert project["authors"] == [{"name": "longspan developers"}] and project["urls"]


def test_files_for_others_can_be_read() -> None:
    """A workflow or a form with a mistake in its YAML is ignored without a word."""
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) >= 7
    for path in files:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict), path
        for job in content.get("jobs", {}).values():
            assert job["runs-on"] and job["timeout-minutes"] and job["steps"], path
    json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))


def test_the_image_copies_what_is_there() -> None:
    """A file that was renamed breaks an image that nobody builds here; no builder is at hand."""
    lines = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    instructions = [line for line in lines if line.strip() and not line.startswith("#")]
    kinds = [line.split()[0] for line in instructions]
    assert kinds[0] == "FROM" and set(kinds) <= {
        "FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"
    }  # fmt: skip
    for line in instructions:
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = next(line.partition("=")[2] for line in instructions if line.startswith("ARG EXTRAS"))
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert kinds.index("USER") < kinds.index("ENTRYPOINT")


def test_notes_of_a_release_are_its_section_alone() -> None:
    """Notes that hold another release's changes, or none."""
    spec = importlib.util.spec_from_file_location("release_notes", ROOT / ".ci" / "release_notes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    changelog = (
        "# Changelog\n\n## [Unreleased]\n\nx\n\n## [0.2.0] - 2026-12-01\n\n- new\n\n## [0.1.0]\n\n- old\n"
    )
    assert module.release_notes(changelog, "0.2.0") == "- new"
    assert module.release_notes(changelog, "0.1.0") == "- old"
    for absent in ("0.3.0", "0.2"):
        with pytest.raises(SystemExit, match="no section"):
            module.release_notes(changelog, absent)


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    """A template or recipe that only a checkout has is missed by whoever installs the package."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    package = Path(longspan.__file__).parent
    shipped = {path for pattern in setuptools["package-data"]["longspan"] for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files == {path for path in shipped if path.is_file()}
