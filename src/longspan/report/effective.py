"""An effective context in words: a length, or why there is none."""

from __future__ import annotations

from longspan.report.layouts import length_text
from longspan.report.tables import Grid
from longspan.report.view import unscored_text


def effective_text(grid: Grid) -> str:
    """Write an effective context; `< 1,024`, `not shown` or `not measured` where there is none."""
    effective = grid.effective
    if effective.length is not None:
        return length_text(effective.length)
    return (
        f"< {length_text(effective.ended)}"
        if effective.why == "below" and effective.ended
        else effective.text
    )


def effective_note(grid: Grid) -> str:
    """Say why an effective context is not shown, not measured, or not longer; empty where the model did not hold."""
    effective = grid.effective
    if effective.length is None and not grid.total.scored and grid.total.unscored:
        return unscored_text(grid.total)
    return effective.note
