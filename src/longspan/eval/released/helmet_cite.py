"""HELMET's citation tasks (ALCE, Gao et al. 2023): answers from many passages, which they cite."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.core.errors import DataError
from longspan.core.files import read_json
from longspan.eval.released.helmet_set import SEED, HelmetSet
from longspan.eval.released.longllm import read_settings
from longspan.eval.released.rows import Rows, find_rows


class Cite(HelmetSet):
    """Questions to be answered from many passages, which the answer cites; two cited answers stand first."""

    def _open(self) -> None:
        super()._open()
        self._prompt = _cite_prompt(self._root, self.subtask)
        # As published, the examples of all rows are drawn in the order of the file, before rows are chosen.
        drawn, demos = random.Random(SEED), range(len(self._prompt["demos"]))
        self._shown = [drawn.sample(demos, self._shots) for _ in range(len(self._rows))]

    def size(self, number: int) -> int:
        """Return about how many bytes the question has: passages fill the length."""
        return 4 * self._length

    def describe(self) -> dict[str, Any]:
        """Return what determines the questions."""
        return {**super().describe(), "prompt": self._prompt}

    def _example(self, place: int) -> tuple[dict[str, str], list[str]]:
        prompt, rows = self._prompt, self._rows
        demos = [prompt["demos"][number] for number in self._shown[place]]
        shown = "\n\n\n".join(
            prompt["demo_prompt"].format(
                **{**demo, "instruction": prompt["instruction"], "context": self._numbered(demo["docs"])}
            )
            for demo in demos
        )
        passages = rows.field(place, "docs")[: self._settings["k"][self._length]]
        values = {
            "context": self._numbered(passages),
            "question": rows.field(place, "question"),
            "instruction": prompt["instruction"],
            "demos": f"{shown}\n\n\n" if demos else "",
        }
        if self.subtask == "asqa":
            return values, [each["long_answer"] for each in rows.field(place, "annotations")]
        return values, [", ".join(part[0] for part in self._parts(place))]

    def _more(self, place: int) -> dict[str, Any]:
        return {"alternatives": self._parts(place), "place": place}

    def _parts(self, place: int) -> list[list[str]]:
        """Return the parts of a right answer, each with the forms it may have."""
        if self.subtask == "asqa":
            parts = [pair["short_answers"] for pair in self._rows.field(place, "qa_pairs") or ()]
        else:
            parts = self._rows.field(place, "answers")
        if not parts or not all(parts):
            raise DataError(f"{self._rows.path}: row {place + 1} has no answer", found=repr(parts)[:80])
        return list(parts)

    def _numbered(self, passages: Sequence[dict[str, str]]) -> str:
        form = self._prompt["doc_prompt"]
        return "\n\n".join(form.format(**{**each, "ID": number}) for number, each in enumerate(passages, 1))


def passages_file(root: Path, name: str) -> Rows:
    """Return the rows of a set of `cite`, with their passages in `docs`. Raises DataError: the file is missing."""
    place = read_settings("helmet.yaml")["cite"]["datasets"][name]["file"].format(name=name)
    return find_rows(root, [place, f"data/{place}"], what=f"helmet_cite/{name}")


def _cite_prompt(root: Path, name: str) -> dict[str, Any]:
    """Return the released prompt of a set of `cite`. Raises DataError: it is missing, or none."""
    file = f"{name}_revised.json"
    places = [folder / file for folder in (root / "prompts", root / "alce", root.parent / "prompts")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(
            f"the prompt of helmet_cite/{name} is not there",
            allowed=list(map(str, places)),
            fix="put the folder prompts of HELMET's repository beside its data",
        )
    prompt = read_json(path)
    wanted = ("instruction", "demo_prompt", "doc_prompt", "demos")
    if missing := [key for key in wanted if not (isinstance(prompt, dict) and prompt.get(key))]:
        raise DataError(f"{path} is no prompt of HELMET", found=f"no {', '.join(missing)}")
    return dict(prompt)
