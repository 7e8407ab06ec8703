"""Optional packages: imported at use, with one wording for their absence."""

from __future__ import annotations

import importlib
from types import ModuleType

from longspan.core.errors import MissingDependencyError


def require(module: str, *, extra: str, feature: str) -> ModuleType:
    """Import and return `module`.

    Raises:
        MissingDependencyError: the package is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Another name means that `module` is there and lacks something itself: that is not ours to explain.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{feature} needs the package {module!r}, which is not installed",
            fix=f"pip install 'longspan[{extra}]'",
        ) from None
