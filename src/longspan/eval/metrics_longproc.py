"""LongProc's metrics: whether a long procedure ends right, and how far it is right from its start.

`score` is what its tables show (accuracy; F1 of rows for html_to_tsv), `partial` the share of the procedure before the
first mistake. An answer that its code cannot read scores 0 here, where some end the published run; a share is never
below 0. What a model wrote is run for pseudo_to_code alone, and only where that was asked for (`eval.compiled`).
"""

from __future__ import annotations

import csv
import re
import string
from collections.abc import Mapping, Sequence
from operator import add, mul, sub, truediv
from typing import Any

from longspan.core.errors import ArgumentError
from longspan.eval.compiled import passes

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_BELIEF = re.compile(
    r"\b(a|an|the|on|in|at|the|step|thinks|think|believes|believe|is|are|of|location|know|knows|belief)\b"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FORMAT = "Output the plan in the required format:"
_PROCEDURE = "<Solving Procedure>"
_SEARCH = "# Search Procedure"


def score(expected: str, output: str, fields: Mapping[str, Any], *, partial: bool = False) -> float:
    """Return the score of one output; `partial` as above. Needs `subtask` of `fields`, and what its problem is."""
    subtask = fields["subtask"]
    if subtask == "html_to_tsv":
        return _rows_f1(expected, output)
    if subtask == "path_traversal":
        return _route(expected, output, partial=partial)
    if subtask == "tom_tracking":
        return _beliefs(expected, output, partial=partial)
    if subtask == CODE:
        return _program(output, fields)
    if subtask == "countdown":
        right = _reaches(fields["numbers"], int(fields["target"]), _tagged(output, "Solution"))
        return 1.0 if right else _search_share(expected, output) if partial else 0.0
    right = _visits(fields["cities"], fields["durations"], _tagged(output, "Plan"))
    return 1.0 if right else _plan_share(expected, output) if partial else 0.0


CODE = "pseudo_to_code"
"""Its score takes running what a model wrote."""
SUBTASKS = ("html_to_tsv", "path_traversal", "tom_tracking", "countdown", "travel_planning", CODE)


def _program(output: str, fields: Mapping[str, Any]) -> float:
    if not fields.get("run_code"):
        raise ArgumentError(
            f"the score of {CODE} takes running what the model wrote on this machine",
            fix="--run-code allows it: in a folder of its own, with limits of time and memory, but in no sandbox",
        )
    fenced = re.search(r"```cpp([\s\S]*)```", output.replace("```c++", "```cpp"))
    return float(fenced is not None and passes(fenced.group(1), fields["test_cases"]))


def _tagged(output: str, tag: str) -> str | None:
    start, end = output.find(f"<{tag}>"), output.find(f"</{tag}>")
    return None if start < 0 or end < 0 else output[start + len(tag) + 2 : end].strip()


def _rows_f1(expected: str, output: str) -> float:
    fenced = re.search(r"```tsv([\s\S]*)```", output)
    table = fenced.group(1) if fenced else output.split("```tsv")[1] if "```tsv" in output else output
    wanted, given = _table(expected), _table(table)
    if not wanted or not given or len(wanted[0]) != len(given[0]):
        return 0.0
    precision = sum(row in wanted for row in given) / len(given)
    recall = sum(row in given for row in wanted) / len(wanted)
    return 2 * recall * precision / (recall + precision) if recall + precision else 0.0


def _table(text: str) -> list[tuple[str, ...]]:
    """Return the rows below the head of a table, each cell normalised; a row of another width is all N/A."""
    try:
        head, *rows = csv.reader(text.strip().split("\n"), delimiter="\t")
    except (csv.Error, ValueError):
        return []
    if len(set(head)) < len(head):
        return []
    if rows and len(rows[-1]) != len(head):
        rows.pop()
    return [tuple(map(_cell, row)) if len(row) == len(head) else (_cell("N/A"),) * len(head) for row in rows]


def _cell(text: str) -> str:
    return "".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _route(expected: str, output: str, *, partial: bool) -> float:
    route = _tagged(output, "Route")
    if route is None:
        return 0.0
    if route == expected.strip():
        return 1.0
    if not partial:
        return 0.0
    wanted, given = expected.strip().split("\n"), route.split("\n")
    wrong = _first(one != other for one, other in zip(wanted, given))
    # As published: the line of the mistake counts.
    return ((min(len(wanted), len(given)) - 1 if wrong is None else wrong) + 1) / len(wanted)


def _beliefs(expected: str, output: str, *, partial: bool) -> float:
    wanted, given = _believed(expected), _believed(output)
    if wanted == given:
        return 1.0
    if not partial or not wanted:
        return 0.0
    wrong = _first(one != other for one, other in zip(given, wanted))
    return (min(len(given), len(wanted)) if wrong is None else wrong) / len(wanted)


def _believed(text: str) -> list[str]:
    lines = "\n".join(line for line in text.splitlines() if line.strip().startswith("-")).strip().split("\n")
    plain = (
        line.lower().translate(_PUNCTUATION).replace("\u2019", "") for line in lines if line.startswith("-")
    )
    return [belief for line in plain if (belief := " ".join(_BELIEF.sub(" ", line).split()))]


def _reaches(numbers: Sequence[int], target: int, solution: str | None) -> bool:
    lines = [] if solution is None else solution.split("\n")
    left = list(numbers)
    if len(lines) != 3:
        return False
    for line in lines:
        step = _equation(line)
        if step is None:
            return False
        for number in step[:2]:
            if number not in left:
                return False
            left.remove(number)
        left.append(step[2])
    return left[0] == target


def _equation(line: str) -> tuple[int, int, int] | None:
    """Return a, b and c of a right equation `a + b = c`; None: it is wrong, or none."""
    sides = line.strip().split("=")
    sign = next((sign for sign in "+-*/" if sign in sides[0]), None)
    if len(sides) != 2 or sign is None:
        return None
    try:
        one, two = map(int, sides[0].split(sign))
        result = int(sides[1])
        made = {"+": add, "-": sub, "*": mul, "/": truediv}[sign](one, two)
    except (ValueError, ArithmeticError):
        return None
    return (one, two, result) if made == result else None


def _search_share(expected: str, output: str) -> float:
    if _SEARCH not in output:
        return 0.0
    given = output.split(_SEARCH)[-1].strip().split("\n")
    wanted = expected.split(_SEARCH)[-1].split("Now we have found the target")[0].strip().split("\n")
    if given[0] != wanted[0]:
        return 0.0
    wrong = _first(_departs(one, other) for one, other in zip(given[1:], wanted[1:]))
    reached = min(len(given), len(wanted)) - 2 if wrong is None else wrong
    return max(0, reached) / (len(wanted) - 1)


def _departs(given: str, wanted: str) -> bool:
    """Return whether a step is another one: other numbers, or a branch that is dropped in only one of both."""
    if given == wanted or "Pick two numbers" in wanted:
        return given != wanted
    dropped = ["drop this branch" in line for line in (given, wanted)]
    return given.split("=")[0] != wanted.split("=")[0] or dropped[0] != dropped[1]


def _visits(cities: str, durations: str, plan: str | None) -> bool:
    wanted = list(
        zip((city for city in cities.split("**") if city), map(int, filter(None, durations.split("**"))))
    )
    return plan is not None and bool(wanted) and _parsed_plan(plan)[: len(wanted)] == wanted


def _parsed_plan(plan: str) -> list[tuple[str, int]]:
    """Return cities and days of their stays, as the natural-plan benchmark reads them from a text."""
    visits, flights, total = [], [], None
    for line in plan.split("\n"):
        if stated := re.findall(r"European cities for (\d+) days", line):
            total = int(stated[0])
        if days := re.findall(r"\d+-\d+", line):
            visits.append(days[0])
            if int(days[0].split("-")[1]) == total:
                break  # the end of the plan: what follows may be another one
        if flown := re.findall(r".*Day (\d+).*from (\w+) to (\w+)", line):
            flights.append(flown[0])
    if not visits or not flights:
        return []
    cities = [flights[0][1], *(to for _, _, to in flights)]
    days_of = [1, *(int(day) for day, _, _ in flights), int(visits[-1].split("-")[1])]
    return [(city, end - start + 1) for city, start, end in zip(cities, days_of, days_of[1:])]


def _plan_share(expected: str, output: str) -> float:
    wanted, given = (text.replace(_FORMAT, "") for text in (expected, output))
    wanted = _PROCEDURE + wanted.split(_PROCEDURE)[1]
    if _PROCEDURE in given:
        given = _PROCEDURE + given.split(_PROCEDURE)[1]
    lines = [[line for line in text.split("\n") if line.strip()] for text in (given, wanted)]
    pairs = list(zip(*lines))
    wrong = _first(_line(want) not in _line(have) for have, want in pairs)
    return (max(0, len(pairs) - 1) if wrong is None else wrong) / len(lines[1])


def _line(text: str) -> str:
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _first(flags: Any) -> int | None:
    return next((place for place, flag in enumerate(flags) if flag), None)
