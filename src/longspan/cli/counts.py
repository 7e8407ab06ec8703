"""Options that count: `2e6`, `2M` and `2,000,000` are two million, wherever one is read."""

from __future__ import annotations

from typing import Any

import typer

from longspan.core.errors import ArgumentError
from longspan.core.units import parse_count


def count_option(*names: str, help: str, min: int = 0) -> Any:
    """Return an option whose value is a count of at least `min`."""

    def count(value: str | int) -> int:
        try:
            number = parse_count(value)
        except ArgumentError as error:
            raise typer.BadParameter(str(error)) from None
        if number < min:
            raise typer.BadParameter(f"{value} is less than {min}")
        return number

    return typer.Option(*names, help=help, parser=count, metavar="COUNT")
