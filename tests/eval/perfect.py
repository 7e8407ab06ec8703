"""Answerers that know, for any task, what is expected of each prompt, or that are always wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.data.tokenizer import Tokenizer
from longspan.eval.runner import run_task
from longspan.eval.task import Task
from tests.eval.answerers import Knowing


def run_perfect(task: Task, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """Run a task on an answerer that gives the expected answers (all parts, or the first of several)."""
    truths: dict[str, str] = {}
    for planned in task.plan():
        built = task.build(planned)
        several = [built.expected] if isinstance(built.expected, str) else built.expected
        parts = planned.fields.get("metric") == "string_match_all"
        truths[built.request.prompt] = ", ".join(several) if parts else several[0]
    answerer = Knowing(tokenizer, knows=truths.__getitem__)
    return run_task(task, answerer, tokenizer=tokenizer, label="perfect", out=out)


def run_wrong(task: Task, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """Run a task on an answerer that says what is never right."""
    answerer = Knowing(tokenizer, knows=lambda prompt: "~")
    return run_task(task, answerer, tokenizer=tokenizer, label="wrong", out=out)
