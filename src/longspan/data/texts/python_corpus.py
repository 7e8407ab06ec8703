"""Real text that every CPython carries, as a corpus of three sources with a wide range of lengths.

    code         standard-library sources, the files of one package joined in path order
                 (the code-repository recipe of ProLong, arXiv 2410.02660 section 3.1): 1K to 500K characters
    reference    the prose behind `help("topic")`: 0.3K to 60K characters
    docstrings   single docstrings of at least 200 characters: mostly short

About 10 MB on CPython 3.11; the exact texts follow the interpreter's version. A document belongs to train,
validation or test by a hash of its module's name, so a docstring never stands in one split and the source
it was taken from in another.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from longspan.core.errors import DataError
from longspan.core.files import atomic_dir, atomic_write

SPLITS = ("train", "validation", "test")
SPLIT_BORDERS = (0.8, 0.9)
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
MIN_CODE_CHARS = 1_000
MAX_CODE_CHARS = 500_000
MIN_DOCSTRING_CHARS = 200


class CorpusDocument(NamedTuple):
    """One document of the corpus; `name` is unique within its source."""

    source: str
    name: str
    group: str
    text: str


def split_of(group: str) -> str:
    """Return the split of a group of documents, a pure function of its name: 80 % train, 10 % each other."""
    share = int.from_bytes(hashlib.md5(group.encode(), usedforsecurity=False).digest()[:8], "big") / 2**64
    return SPLITS[sum(share >= border for border in SPLIT_BORDERS)]


def python_documents() -> Iterator[CorpusDocument]:
    """Yield the documents in a fixed order. Raises DataError when no standard-library source is found."""
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = _packages(library)
    if not packages:
        raise DataError(
            f"no standard-library source was found in {library}", fix="install CPython with its .py files"
        )
    for package, paths in packages.items():
        yield from _code_documents(package, [(path.relative_to(library).as_posix(), path) for path in paths])
    yield from reference_documents()
    for package, paths in packages.items():
        for path in paths:
            yield from _docstring_documents(package, path.relative_to(library).as_posix(), path)


def write_python_corpus(out: Path, *, max_chars: int | None = None) -> dict[str, dict[str, int]]:
    """Write `out/{train,validation,test}/{source}.jsonl` and return the number of documents of each.

    `max_chars` keeps only the leading documents of each source up to that many characters in all (for small
    runs). The folder appears whole or not at all.
    """
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    used: dict[str, int] = {}
    records: dict[tuple[str, str], list[str]] = {}
    for document in python_documents():
        total = used.get(document.source, 0)
        if max_chars is not None and total + len(document.text) > max_chars:
            continue
        used[document.source] = total + len(document.text)
        split = split_of(document.group)
        record = {"text": document.text, "source": document.source, "name": document.name}
        records.setdefault((split, document.source), []).append(json.dumps(record, ensure_ascii=True))
        counts[split][document.source] = counts[split].get(document.source, 0) + 1
    with atomic_dir(out, replace=True) as aside:
        for (split, source), lines in records.items():
            with atomic_write(aside / split / f"{source}.jsonl", "w") as file:
                file.write("\n".join(lines) + "\n")
    return counts


def _packages(library: Path) -> dict[str, list[Path]]:
    packages: dict[str, list[Path]] = {}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        folders = relative.parts[:-1]
        if SKIPPED_FOLDERS.intersection(folders) or relative.name.startswith("test_"):
            continue
        packages.setdefault(folders[0] if folders else relative.stem, []).append(path)
    return packages


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _code_documents(package: str, files: list[tuple[str, Path]]) -> Iterator[CorpusDocument]:
    """Join the files of a package; one over MAX_CODE_CHARS is cut between files into several documents."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, path in files:
        text = f"# {name}\n{_read(path).strip()}\n\n"
        if size and size + len(text) > MAX_CODE_CHARS:
            parts.append([])
            size = 0
        parts[-1].append(text)
        size += len(text)
    for number, texts in enumerate(parts):
        text = "".join(texts)
        if len(text) >= MIN_CODE_CHARS:
            yield CorpusDocument("code", f"{package}/{number}", package, text)


def reference_documents() -> Iterator[CorpusDocument]:
    """Yield the prose behind `help("topic")`, in alphabetical order."""
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield CorpusDocument("reference", name, f"topic {name}", text.strip() + "\n")


def _docstring_documents(package: str, name: str, path: Path) -> Iterator[CorpusDocument]:
    with warnings.catch_warnings():
        # Old modules hold escapes that newer compilers warn about.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(_read(path))
        except SyntaxError:
            return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_DOCSTRING_CHARS:
                label = getattr(node, "name", "module")
                yield CorpusDocument(
                    "docstrings", f"{name}:{label}:{getattr(node, 'lineno', 0)}", package, text + "\n"
                )
