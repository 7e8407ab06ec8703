"""Every table of the page as it is shown, as CSV and as LaTeX for a paper."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longspan.report.csv_files import csv_text
from longspan.report.view import MISSING, Chart, Section, Table, TableCell

_LONGEST = 70
_ESCAPED = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\u2212": "$-$",
    "\u2192": r"$\to$",
    "\u00d7": r"$\times$",
    "\u00b1": r"$\pm$",
    "\u2026": r"\ldots{}",
    "\u2013": "--",
}


def page_tables(sections: Sequence[Section]) -> dict[str, str]:
    """Return file name -> text of every table of a page, twice: .csv and .tex (a tabular for the package booktabs)."""
    files: dict[str, str] = {}
    for section in sections:
        for table in _tables(section.parts):
            words = re.sub(r"[^\w.]+", "-", table.caption).strip("-")[:_LONGEST]
            name, number = f"{section.id}-{words}", 1
            while f"{name}.csv" in files:
                number += 1
                name = f"{section.id}-{words}-{number}"
            rows = [[_text(cell) for cell in row] for row in table.rows]
            plain = [[_plain(text) for text in row] for row in rows]
            files[f"{name}.csv"] = csv_text(list(table.columns), plain)
            files[f"{name}.tex"] = latex(table)
    return files


def _tables(part: Any) -> Iterator[Table]:
    """Yield the tables of a section's parts in their order."""
    if isinstance(part, Table):
        yield part
    elif isinstance(part, Chart):
        yield from _tables(part.table)
    elif isinstance(part, Mapping):
        for each in part.values():
            yield from _tables(each)
    elif isinstance(part, list | tuple):
        for each in part:
            yield from _tables(each)


def latex(table: Table) -> str:
    """Return a table as a tabular with booktabs' rules; names to the left, numbers to the right."""
    width = len(table.columns)
    left = ["l" if all(_is_left(row[n]) for row in table.rows) else "r" for n in range(1, width)]
    lines = [" & ".join(_cell(cell) for cell in row) + r" \\" for row in table.rows]
    head = " & ".join(map(_escaped, table.columns)) + r" \\"
    comment = f"% {' '.join(table.caption.split())}"
    begin = rf"\begin{{tabular}}{{l{''.join(left)}}}"
    return "\n".join(
        [comment, begin, r"\toprule", head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", ""]
    )


def _is_left(cell: str | TableCell) -> bool:
    return isinstance(cell, str) or "num" not in cell.cls


def _cell(cell: str | TableCell) -> str:
    text = _escaped(_text(cell))
    bold = isinstance(cell, TableCell) and bool({"strong", "reference"} & set(cell.cls.split()))
    return rf"\textbf{{{text}}}" if bold and text else text


def _text(cell: str | TableCell) -> str:
    """Return what a cell shows; a name that the page shows once for several rows stands in each of them."""
    text = cell if isinstance(cell, str) else cell.text or cell.title
    return text.replace("\u00a0", " ")


def _plain(text: str) -> float | str:
    """Return a number where a cell is one, as a spreadsheet reads it; nothing for a dash."""
    if text == MISSING:
        return ""
    number = text.replace("\u2212", "-").replace(",", "")
    return (
        float(number)
        if re.fullmatch(r"[+-]?\d+\.\d+", number)
        else int(number)
        if re.fullmatch(r"[+-]?\d+", number)
        else text
    )


def _escaped(text: str) -> str:
    words = (character for character in " ".join(text.split()) if character.isprintable())
    return "".join(_ESCAPED.get(character, character) for character in words)
