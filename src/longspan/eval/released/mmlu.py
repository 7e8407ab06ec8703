"""MMLU from the released `long-llm` files: which of the letters A to D the model finds the likeliest.

    ROOT/mmlu/test.json     query, subject, choices, answer (number of the right choice), query_id; a JSON line each
    ROOT/mmlu/dev.json      the same, for examples

One request for each letter; examples and question are read once for all four. Accuracy is averaged over
subjects, in four groups and over all; a group without subjects is left out. The layout and the groups are from
FlagEmbedding's Long_LLM; a question's record is named by its query_id, not by its row, and the end token
of a chat's turn is never measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from longspan.core.errors import ArgumentError
from longspan.eval.compound import Compound, Judged, PlannedCompound, run_compounds
from longspan.eval.prompts import PromptForm
from longspan.eval.records import make_header, sample_id
from longspan.eval.released.longllm import read_settings
from longspan.eval.released.rows import Rows, find_rows
from longspan.eval.summaries import mean_by
from longspan.infer.requests import Answer, Answerer, Request

LETTERS = "ABCD"
READER_VERSION = 1
_HEAD = "The following are multiple choice questions (with answers) about {subject}.\n\n"


def run_mmlu(
    root: Path,
    answerer: Answerer,
    *,
    form: PromptForm,
    label: str,
    out: str | Path,
    num_fewshot: int = 0,
    limit: int | None = None,
    subjects: Sequence[str] = (),
    note: str | None = None,
    used: Mapping[str, Any] | None = None,
    retry_unscored: bool = False,
) -> dict[str, Any]:
    """Ask; write one record a question to `out`, return a summary.

    Args:
        num_fewshot: examples of the subject in front of each question, the first of dev.json.
        limit: the first so many questions of each subject.
        subjects: none: all.

    Returns:
        what every summary holds, by_subtask (accuracy of each subject) and by_category (mean over its subjects;
        `All` over all of them).

    Raises:
        ConfigError: `out` holds an evaluation with other settings.
        DataError: a file is missing or broken.
        ArgumentError: there is no such subject.
    """
    rows = find_rows(root, ["mmlu/test.json*", "test.json*"], what="mmlu").load()
    examples = _examples(root, num_fewshot)
    header = make_header(
        "harness",
        label,
        model_info=answerer.identity,
        note=note,
        used=used,
        tokenizer=form.tokenizer.fingerprint,
        seed=0,
        params={
            "sets": {"mmlu": {"file": rows.path.name, "sha256": rows.sha256}},
            "num_fewshot": num_fewshot,
            "examples_sha256": None if examples is None else examples.sha256,
            "limit": limit,
            "subjects": list(subjects),
            **form.params(),
            "mode": "teacher_forced",
            "scorer": {"name": "accuracy", "version": 1},
            "reader_version": READER_VERSION,
        },
    )
    shown = _shown(examples, num_fewshot)
    planned = []
    for place in _chosen(rows, subjects, limit):
        subject = str(rows.field(place, "subject"))
        number = rows[place].get("query_id", place)
        fields = {"dataset": "mmlu", "subtask": subject, "metric": "accuracy", "sample": number}
        planned.append(
            PlannedCompound(
                sample_id(header, "mmlu", subject, number),
                (rows.size(place) + len(shown.get(subject, ""))) // 4,
                fields,
                partial(_compose, rows, place, shown.get(subject, ""), form),
            )
        )
    summary, records = run_compounds(planned, answerer, header=header, out=out, retry_unscored=retry_unscored)
    subtasks = mean_by(records, "dataset", "subtask")
    return {**summary, "by_subtask": subtasks, "by_category": category_means(subtasks)}


def category_means(subjects: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean accuracy over the subjects of each group, and of `All`; empty groups are left out."""
    groups: dict[str, list[float]] = {}
    names = read_settings("mmlu.yaml")
    for row in subjects:
        if row["mean"] is not None:
            groups.setdefault(_category(names, row["subtask"]), []).append(row["mean"])
            groups.setdefault("All", []).append(row["mean"])
    order = [*names, "Other", "All"]
    return {name: sum(groups[name]) / len(groups[name]) for name in order if name in groups}


def _category(names: Mapping[str, Sequence[str]], subject: str) -> str:
    return next((category for category, subjects in names.items() if subject in subjects), "Other")


def _chosen(rows: Rows, subjects: Sequence[str], limit: int | None) -> list[int]:
    """Return the places of the questions, subject by subject, so that examples are shared."""
    by_subject: dict[str, list[int]] = {}
    for place in range(len(rows)):
        by_subject.setdefault(str(rows.field(place, "subject")), []).append(place)
    unknown = [name for name in subjects if name not in by_subject]
    if unknown:
        raise ArgumentError("there is no such subject", found=", ".join(unknown), allowed=sorted(by_subject))
    return [place for name in subjects or sorted(by_subject) for place in by_subject[name][:limit]]


def _examples(root: Path, num_fewshot: int) -> Rows | None:
    if not num_fewshot:
        return None
    return find_rows(root, ["mmlu/dev.json*", "dev.json*"], what="mmlu's examples").load()


def _shown(examples: Rows | None, count: int) -> dict[str, str]:
    """Return the answered questions in front of each subject's."""
    by_subject: dict[str, list[str]] = {}
    for place in range(0 if examples is None else len(examples)):
        assert examples is not None
        texts = by_subject.setdefault(str(examples.field(place, "subject")), [])
        if len(texts) < count:
            letter = LETTERS[int(examples.field(place, "answer"))]
            texts.append(f"{_question(examples, place)} {letter}\n\n")
    return {subject: "".join(texts) for subject, texts in by_subject.items()}


def _question(rows: Rows, place: int) -> str:
    choices = rows.field(place, "choices")
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices))
    return f"{str(rows.field(place, 'query')).strip()}\n{options}Answer:"


def _compose(rows: Rows, place: int, shown: str, form: PromptForm) -> Compound:
    subject = str(rows.field(place, "subject")).replace("_", " ")
    prompt = f"{_HEAD.format(subject=subject)}{shown}{_question(rows, place)}"
    letters = LETTERS[: len(rows.field(place, "choices"))]
    requests: list[Request] = [form.request(prompt, answer=letter) for letter in letters]
    right = letters[int(rows.field(place, "answer"))]

    def judge(answers: Sequence[Answer]) -> Judged:
        losses = [float(np.sum(answer.nll, dtype=np.float64)) for answer in answers if answer.nll is not None]
        chosen = letters[int(np.argmin(losses))]
        return Judged(chosen, float(chosen == right), fields={"choice_nll": losses})

    return Compound("score", requests, right, judge, {})
