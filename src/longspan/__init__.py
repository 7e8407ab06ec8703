"""longspan: take a language model from a short context window to a long one.

The names below are the pieces to build with; each is imported from its room when it is first used, so
`import longspan` costs nothing and needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.core.errors import (
        ArgumentError,
        ConfigError,
        DataError,
        LongspanError,
        MissingDependencyError,
        RunError,
        UserError,
    )

__version__ = "0.1.0"

_HOMES = {
    "ArgumentError": "longspan.core.errors",
    "ConfigError": "longspan.core.errors",
    "DataError": "longspan.core.errors",
    "LongspanError": "longspan.core.errors",
    "MissingDependencyError": "longspan.core.errors",
    "RunError": "longspan.core.errors",
    "UserError": "longspan.core.errors",
}

__all__ = [
    "ArgumentError",
    "ConfigError",
    "DataError",
    "LongspanError",
    "MissingDependencyError",
    "RunError",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longspan' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
