"""Texts and tables that released code assigns to names: a Python file is parsed for them, and never run."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.core.errors import DataError


def literals_in(path: Path, names: Sequence[str], *, allowed: str) -> dict[str, Any]:
    """Return what a file assigns to names at its top, the last of several assignments.

    Args:
        allowed: which file is wanted, for the message.

    Raises:
        DataError: the file cannot be read, or one of the names is assigned no literal.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id in names
        }
        if missing := [name for name in names if name not in assigned]:
            raise ValueError(f"it assigns nothing to {', '.join(missing)}")
        return {name: ast.literal_eval(assigned[name]) for name in names}
    except (OSError, ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} does not hold what is read of it",
            found=f"{type(error).__name__}: {error}",
            allowed=allowed,
        ) from None
