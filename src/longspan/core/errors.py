"""The exception tree.

LongspanError
+-- UserError               the user can mend it; exit code 2, no traceback
|   +-- ArgumentError       a command-line argument or function argument
|   +-- ConfigError         a recipe, a --set override, settings that contradict each other
|   +-- DataError           a file: missing, malformed, truncated, of another kind
|   +-- MissingDependencyError   an optional package that is not installed
+-- RunError                the machine gave up: full disk, dead rank, no memory; exit code 1

try:
    table = LengthTable.load(path)
except longspan.DataError as error:
    print(error)            # one message: what, found, allowed, how to mend it
"""

from __future__ import annotations


class LongspanError(Exception):
    """Base of every error that longspan raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        allowed: object = None,
        fix: str | None = None,
    ) -> None:
        parts = [what]
        if found is not None:
            parts.append(f"found: {found}")
        if allowed is not None:
            parts.append(f"allowed: {_listing(allowed)}")
        if fix is not None:
            parts.append(f"to mend it: {fix}")
        super().__init__("\n  ".join(parts))


class UserError(LongspanError):
    """Something the user wrote or pointed at is wrong, and the message says how to mend it."""

    exit_code = 2


class ArgumentError(UserError):
    """An argument has a value outside what is allowed."""


class ConfigError(UserError):
    """A recipe or an override is wrong, or two settings contradict each other."""


class DataError(UserError):
    """A file is missing, malformed, truncated or of another kind than expected."""


class MissingDependencyError(UserError):
    """A feature needs an optional package that is not installed."""


class RunError(LongspanError):
    """The run cannot go on: full disk, out of memory, a dead process."""


def _listing(allowed: object) -> str:
    if isinstance(allowed, (list, tuple, set, frozenset)):
        items = sorted(allowed, key=str) if isinstance(allowed, (set, frozenset)) else allowed
        return ", ".join(str(item) for item in items)
    return str(allowed)
