"""What differs between two evaluations beside the model: a change of their numbers may come from any of it.

Compared are headers: tokenizer, seed and every parameter that decides what is asked and how it is scored. What only
says how much was asked (lengths, samples) is left out, since numbers are compared at the same length. Parameters that
one side does not have are those of an older version, unless they are set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from longspan.report.load import RecordFile

_BY_TASK = {
    "tasks": "task settings",
    "sets": "data sets",
    "metrics": "metrics",
    "qa_sha256": "documents of qa",
}
"""Parameters that hold one value for each data set: those that both have are compared."""
_HOW_MUCH = ("lengths", "depths", "samples", "counts", "limit", "subtasks", "datasets", "subjects")
_ASIDE = frozenset((*_HOW_MUCH, *_BY_TASK, "note", "stop_ids"))
_HOW_ASKED = frozenset(
    (
        "BOS",
        "answer prefix",
        "chat template",
        "examples sha256",
        "max new tokens",
        "mode",
        "num fewshot",
        "scorer",
        "template args",
        "thinking",
        "tokenizer",
    )
)
"""What may differ, in the words of `differing`, while the questions stay the same."""
_NAMES = {
    "answer_digits": "digits",
    "num_distractors": "number of distractors",
    "num_needles": "number of needles",
    "essay_sha256": "essays",
    "data_sha256": "documents",
    "prompts_sha256": "prompts",
    "thinks": "thinking",
    "bos": "BOS",
}


def tasks_of(task: str) -> tuple[str, ...]:
    """Return the tasks whose files hold the samples of a task: needles among others are in those of needle too."""
    return ("needle", task) if task == "needle_distractors" else (task,)


def differing(files: Sequence[RecordFile], task: str, one: str, two: str) -> tuple[str, ...]:
    """Return the names of what differs between two labels in the headers of a task, in the words of the options.

    Nothing does where a label has no header.
    """
    found: set[str] = set()
    for each in tasks_of(task):
        sides = ([file for file in files if (file.task, file.label) == (each, name)] for name in (one, two))
        first, second = map(_settings, sides)
        found |= _unlike(first, second) if first and second else set()
    return tuple(sorted(_NAMES.get(name, name.replace("_", " ")) for name in found))


def same_questions(differ: Iterable[str]) -> bool:
    """Return whether two evaluations that differ in nothing but `differ` asked the same, so that answers are paired."""
    return _HOW_ASKED.issuperset(differ)


def listed(names: Sequence[str]) -> str:
    """Write names as `needle, digits and seed`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def differ_text(names: Sequence[str]) -> str:
    """Write what differs, for the place beside a change; empty where nothing does."""
    if not names:
        return ""
    return f"not comparable: {listed(names)} {'differ' if len(names) > 1 else 'differs'}"


_Key = tuple[str, str]
"""Name of a setting, and the data set that it is for where there are several."""


def _unlike(first: Mapping[_Key, set[str]], second: Mapping[_Key, set[str]]) -> set[str]:
    return {
        name
        for name, part in first.keys() | second.keys()
        if _values(first, (name, part)) != _values(second, (name, part))
        and not (part and ((name, part) not in first or (name, part) not in second))
    }


def _settings(files: Iterable[RecordFile]) -> dict[_Key, set[str]]:
    """Return the values that the files of a label have for each setting."""
    found: dict[_Key, set[str]] = {}
    for file in files:
        header, params = file.header, file.params
        values = {(key, ""): value for key, value in params.items() if key not in _ASIDE}
        values["tokenizer", ""] = header.get("tokenizer")
        values["seed", ""] = header.get("seed", params.get("seed"))
        values["scorer", ""] = file.scorer or None
        for name in _BY_TASK:
            if isinstance(params.get(name), Mapping):
                values |= {(_BY_TASK[name], str(key)): value for key, value in params[name].items()}
        for key, value in values.items():
            found.setdefault(key, set()).add(json.dumps(value, sort_keys=True))
    return found


def _values(settings: Mapping[_Key, set[str]], key: _Key) -> set[str]:
    return settings.get(key, set()) - {"null"}
