"""What the sets of HELMET have in common: how rows are drawn, and how a question becomes a prompt."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from longspan.data.tokenizer import Tokenizer
from longspan.eval.released.rows import Rows, find_rows
from longspan.eval.released.sets import Question, Rule

LENGTHS = (8192, 16384, 32768, 65536, 131072)
SEED = 42
_OMITTED = " ... [the rest of the text is omitted]"


def shuffled(count: int, seed: int) -> list[int]:
    """Return the order in which `datasets` shuffles so many rows."""
    return np.random.default_rng(seed).permutation(count).tolist()


def seed_of(text: str) -> int:
    """Return HELMET's seed of a text."""
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest(), 16) % 2**31


class HelmetSet:
    """A set of HELMET: what all have in common."""

    def __init__(
        self, root: Path, category: str, settings: dict[str, Any], length: int, tokenizer: Tokenizer
    ) -> None:
        self.dataset, self.subtask = f"helmet_{category}", settings["name"]
        self._root, self._settings, self._length = root, settings, length
        self._tokenizer = tokenizer
        self._shots = settings.get("shots", 0)
        self.rule = Rule(
            settings["metric"],
            settings["max_new_tokens"],
            max_length=length - settings["max_new_tokens"],
            cut="end of context",
            omitted=_OMITTED if category in ("longqa", "summ") else "",
        )
        self._open()

    def __len__(self) -> int:
        return len(self._chosen)

    def size(self, number: int) -> int:
        """Return about how many bytes the question has."""
        return self._rows.size(self._chosen[number])

    def describe(self) -> dict[str, Any]:
        """Return what determines the questions."""
        return {"file": self._rows.path.name, "sha256": self._rows.sha256, "length": self._length}

    def question(self, number: int, *, chat: bool) -> Question:
        """Return a question; its prompt ends with the label, save in a chat."""
        values, expected = self._example(self._chosen[number])
        label = self._settings["label"].format_map(values)
        template = self._settings["user"]
        if not chat:
            template += self._settings.get("separator", "\n") + self._settings["label"]
        fields = {"label": label, "label_in_prompt": "" if chat else label, "question": values["question"]}
        if not self._settings["metric"].startswith("helmet_"):
            fields = {"question": values["question"]}
        fields |= self._more(self._chosen[number])
        return Question(template, values, expected, fields)

    def _open(self) -> None:
        """Read the file and choose the questions."""
        self._rows = self._file("file")
        self._chosen = shuffled(len(self._rows), SEED)[: self._settings["max_samples"]]

    def _file(self, key: str) -> Rows:
        k = self._settings.get("k", {}).get(self._length, "")
        place = self._settings[key].format(name=self.subtask, length=self._length, k=k)
        return find_rows(self._root, [place, f"data/{place}"], what=f"{self.dataset}/{self.subtask}")

    def _example(self, place: int) -> tuple[dict[str, str], list[str]]:
        """Return the template's values and the expected answers of a row."""
        raise AssertionError  # each kind of set has its own

    def _more(self, place: int) -> dict[str, Any]:
        """Return what else the metric needs of a row."""
        return {}
