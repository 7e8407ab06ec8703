"""LongProc: procedures that take thousands of tokens to write, each step of which is checked.

    DATA/countdown/countdown_2k.json, DATA/countdown/prompts.yaml          and so on, as in its repository's data/
    DATA/travel_planning/travel_planning_all.json, travel_planning_icl_examples.json

Prompts are those of the files (prompts.yaml); the searches that two of the tasks show and expect are made anew
(`longproc_search`), as by the released code. The score of pseudo_to_code compiles and runs what the model wrote: it is
asked where `run_code` says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

import pydantic

from longspan.core.config import Commas, parse_yaml
from longspan.core.errors import DataError
from longspan.core.files import sha256_bytes
from longspan.eval.compiled import MOST_CASES, compiler
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.metrics_longproc import CODE, SUBTASKS
from longspan.eval.prompts import PromptForm
from longspan.eval.released.longproc_search import countdown, travel
from longspan.eval.released.row_task import Placed, RowsConfig, RowTask, texts_in
from longspan.eval.released.rows import Rows
from longspan.eval.task import Built, Planned

_ROOM = {"0.5k": 1024, "2k": 3072, "8k": 10240}
"""Tokens of an answer by its level, as in the published runs."""
_OUTPUT = {"0.5k": 512, "2k": 2048, "8k": 8192}
_NAME = re.compile(rf"({'|'.join(SUBTASKS)})_(0\.5k|2k|8k|all)\.json")
_DEMOS = (((40, 19, 23, 7), 29), ((9, 16, 6, 18), 12))
_TRAVELS = {"2k": (0, 2048), "8k": (4096, 8192)}


class LongProcConfig(RowsConfig):
    """Settings of LongProc."""

    subtasks: Annotated[tuple[str, ...], Commas] = tuple(name for name in SUBTASKS if name != CODE)
    """What is asked for, of the files that are there; pseudo_to_code needs `run_code`."""
    run_code: bool = False
    """Compile and run on this machine what the model writes for pseudo_to_code, which is then asked too: with limits of
    time and memory, but in no sandbox."""
    levels: Annotated[tuple[str, ...], Commas] = ("0.5k", "2k", "8k")
    """How long answers are."""

    @pydantic.model_validator(mode="after")
    def _are_known(self) -> LongProcConfig:
        for given, known in ((self.subtasks, SUBTASKS), (self.levels, tuple(_ROOM))):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
        if CODE in self.subtasks and not self.run_code:
            raise ValueError(f"{CODE} runs what the model wrote on this machine, which run_code allows")
        return self

    @property
    def asked(self) -> tuple[str, ...]:
        """The subtasks, with the one that runs code."""
        return tuple(dict.fromkeys((*self.subtasks, CODE))) if self.run_code else self.subtasks


class LongProc(RowTask[LongProcConfig]):
    """The task; arguments are those of `RowTask`."""

    name, scorer, axes = "longproc", "longproc", ("subtask", "output_length")
    answer_tokens = max(_ROOM.values())

    @classmethod
    def from_config(cls, config: LongProcConfig, data: TaskDataConfig, form: PromptForm) -> Self:
        """Return the task. Raises ArgumentError: code is to be run, and there is no compiler."""
        if config.run_code:
            compiler()
        return super().from_config(config, data, form)

    def reads(self, name: str) -> bool:
        """Return whether a file holds problems that are asked."""
        found = _NAME.fullmatch(name.rsplit("/", 1)[-1])
        return (
            found is not None
            and found[1] in self.settings.asked
            and found[2] in (*self.settings.levels, "all")
        )

    def placed(self, rows: Rows, number: int, row: dict[str, Any]) -> Placed | None:
        """Return subtask and level; None: a travel of another level."""
        found = _NAME.fullmatch(rows.path.name)
        assert found is not None
        level = found[2]
        if level == "all":
            tokens = int(rows.field(number, "estimated_output_tokens"))
            fitting = [name for name, (low, high) in _TRAVELS.items() if low <= tokens < high]
            if not fitting or fitting[0] not in self.settings.levels:
                return None
            level = fitting[0]
        prompt, _, _ = _problem(rows, number)
        return Placed((found[1], _OUTPUT[level]), len(prompt) // 4)

    def params(self) -> dict[str, Any]:
        """Return what determines the samples; prompts are files of their own."""
        folders = {name: rows.path.parent for name, rows in self._files.items()}
        texts = {name: _template(folder) for name, folder in folders.items()}
        params = super().params()
        if not self.settings.run_code:
            del params["run_code"]  # without it the questions are those from before there was such a setting
        return {**params, "prompts_sha256": sha256_bytes(repr(sorted(texts.items())).encode())[:16]}

    def build(self, planned: Planned) -> Built:
        """Return the prompt of a problem, and what is expected."""
        row = self._rows[planned.key]
        prompt, expected, fields = _problem(row.rows, row.number)
        level = next(name for name, length in _OUTPUT.items() if length == planned.fields["output_length"])
        request = self._form.request(prompt, max_new_tokens=_ROOM[level])
        assert request.prompt_ids is not None
        fields = {**fields, "question": prompt[-400:], "achieved_length": len(request.prompt_ids)}
        return Built(request, fields, expected)


def _problem(rows: Rows, number: int) -> tuple[str, str, dict[str, Any]]:
    """Return prompt, expected procedure and what its scorer needs. Raises DataError: the row is none."""
    found = _NAME.fullmatch(rows.path.name)
    assert found is not None
    try:
        values, expected, fields = _PROBLEMS[found[1]](rows, number)
        return _template(rows.path.parent).format(**values), expected, fields
    except (LookupError, TypeError, ValueError, OSError) as error:
        raise DataError(
            f"{rows.path}: row {number + 1} is no problem of {found[1]}",
            found=f"{type(error).__name__}: {error}",
        ) from None


_Problem = tuple[Mapping[str, Any], str, dict[str, Any]]


def _table(rows: Rows, number: int) -> _Problem:
    names = ("task_topic", "task_description", "gt", "tsv_header", "filtering_instruction", "html_path")
    values = dict(zip(names, texts_in(rows, number, *names)))
    page = (rows.path.parent / values["html_path"]).resolve()
    if not page.is_relative_to(rows.path.parent.resolve()):
        raise ValueError(f"html_path leaves the folder: {values['html_path']}")
    return {**values, "html_str": page.read_text(encoding="utf-8")}, values["gt"], {}


def _route(rows: Rows, number: int) -> _Problem:
    context, answer = texts_in(rows, number, "context_nl", "answer_nl")
    start, end = rows.field(number, "question_repr")[:2]
    return {"city_context": context, "src_city": start, "dst_city": end}, answer, {}


def _beliefs(rows: Rows, number: int) -> _Problem:
    story, question, solution = texts_in(rows, number, "story", "question", "solution")
    return {"story": story, "question": question}, solution, {}


def _countdown(rows: Rows, number: int) -> _Problem:
    numbers, target = [int(each) for each in rows.field(number, "nums")], int(rows.field(number, "target"))
    values = {"demonstration": _countdown_demos(), "nums": numbers, "target": target}
    return values, countdown(numbers, target)[1], {"numbers": numbers, "target": target}


@cache
def _countdown_demos() -> str:
    return "\n\n".join(
        f"# Example\nNumbers: {list(numbers)}\nTarget: {target}\n\n{countdown(numbers, target)[1]}"
        for numbers, target in _DEMOS
    )


def _travel(rows: Rows, number: int) -> _Problem:
    problem, cities, durations = texts_in(
        rows, number, "disambig_question_text", "ground_truth_cities", "ground_truth_durations"
    )
    values = {"demonstration": _travel_demos(rows.path.parent), "problem": problem}
    return values, travel(rows[number]), {"cities": cities, "durations": durations}


@cache
def _travel_demos(folder: Path) -> str:
    shown = Rows(folder / "travel_planning_icl_examples.json")
    return "\n\n".join(f"# Example\n{each['disambig_question_text']}\n\n{travel(each)}" for each in shown)


def _program(rows: Rows, number: int) -> _Problem:
    lines, code, cases = (
        rows.field(number, name) for name in ("pseudocode_lines", "code_lines", "testcases")
    )
    kept = [
        [[str(line) for line in side] for side in (given, wanted)] for given, wanted in cases[:MOST_CASES]
    ]
    if not kept:
        raise ValueError("there are no test cases")
    return {"pseudocode": "\n".join(lines)}, "\n".join(code), {"test_cases": kept, "run_code": True}


_PROBLEMS: Mapping[str, Callable[[Rows, int], _Problem]] = {
    "html_to_tsv": _table,
    "path_traversal": _route,
    "tom_tracking": _beliefs,
    "countdown": _countdown,
    "travel_planning": _travel,
    CODE: _program,
}


@cache
def _template(folder: Path) -> str:
    path = folder / "prompts.yaml"
    if not path.is_file():
        raise DataError(f"{path} is not there", fix="put the whole folder of the release there")
    content = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    prompt = content.get("USER_PROMPT") if isinstance(content, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f"{path} holds no USER_PROMPT")
    return prompt
