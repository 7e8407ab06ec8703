"""One name, one thing: a reader who searches for a class finds one."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import longspan

PACKAGE = Path(longspan.__file__).parent


def test_no_class_name_stands_twice() -> None:
    """Three classes `Sample` in three rooms make every search and every traceback a guess."""
    places = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, f"name each class for what it is: {twice}"
