"""GraphWalks: a directed graph as a long list of edges, and the nodes that a walk reaches, or the parents of one.

Rows are as in the data set `openai/graphwalks`: `prompt`, `answer` or `answer_nodes` (a list), `problem_type` (bfs or
parents). The last line of an answer is `Final Answer: [a, b]`; its score is the F-measure of the two sets of nodes.
Bins hold the tokens of the prompt.
"""

from __future__ import annotations

from typing import Any

from longspan.core.errors import DataError
from longspan.eval.released.binned import DatedConfig, DatedTask, date_of
from longspan.eval.released.row_task import texts_in
from longspan.eval.released.rows import Rows
from longspan.eval.task import Built, Planned


class GraphWalksConfig(DatedConfig):
    """Settings of GraphWalks."""

    kinds: tuple[str, ...] = ("bfs", "parents")
    """What is asked for, of the rows that are asked."""


class GraphWalks(DatedTask[GraphWalksConfig]):
    """The task; arguments are those of `RowTask`."""

    name, scorer, axes = "graphwalks", "graphwalks_f1", ("problem_type", "length")
    answer_tokens = 2048

    def place(self, rows: Rows, number: int, row: dict[str, Any]) -> str | None:
        """Return what is asked for."""
        kind = str(rows.field(number, "problem_type"))
        return kind if kind in self.settings.kinds else None

    def texts(self, rows: Rows, number: int, row: dict[str, Any]) -> list[str]:
        """Return the prompt."""
        _nodes(rows, number)
        return texts_in(rows, number, "prompt")

    def build(self, planned: Planned) -> Built:
        """Return the prompt of a row as the message of a user."""
        found = self._rows[planned.key]
        prompt = str(found.values["prompt"])
        request = self._form.request(prompt, max_new_tokens=self.answer_tokens)
        date = date_of(found.values) or None
        fields = {"question": prompt[-400:], "achieved_length": found.tokens, "date_added": date}
        return Built(request, fields, _nodes(found.rows, found.number) or [""])


def _nodes(rows: Rows, number: int) -> list[str]:
    row = rows[number]
    nodes = row["answer_nodes"] if "answer_nodes" in row else rows.field(number, "answer")
    if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
        raise DataError(f"{rows.path}: row {number + 1} names no list of nodes", found=repr(nodes)[:80])
    return nodes
