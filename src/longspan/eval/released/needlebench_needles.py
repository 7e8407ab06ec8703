"""What NeedleBench's needle tasks ask: which facts are hidden, the question, the answers, the prompt around them.

Facts are drawn as the released code does, by the number of the sample. Which facts `multi_retrieval` hides it draws
once, without a seed; here that draw has the seed 0.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from longspan.core.errors import DataError
from longspan.core.files import read_json, sha256_bytes, sha256_file
from longspan.eval.released.ancestral_trace import Language, Relations, names_of, relations_in
from longspan.eval.released.longllm import read_settings
from longspan.eval.released.row_task import texts_in
from longspan.eval.released.rows import Rows

Version = Literal["v1", "v2"]
Kind = Literal["single_retrieval", "multi_retrieval", "reasoning"]
KINDS: tuple[Kind, ...] = ("single_retrieval", "multi_retrieval", "reasoning")
ENDINGS: Mapping[Language, str] = {"English": "en", "Chinese": "zh"}
_NEEDLE = ("needle", "retrieval_question", "arg2", "language")
_PLACES = ("context", "retrieval_question", "last_person")
"""What v2's reasoning puts into its prompt, in this order where the question stands behind the text."""


@cache
def rules() -> Mapping[str, Any]:
    """Return how the benchmark asks and scores."""
    return read_settings("needlebench.yaml")


class NeedlePart(NamedTuple):
    """What is asked in one language."""

    kind: Kind
    language: Language
    needles: int

    @property
    def subtask(self) -> str:
        """Its name in records."""
        count = f"_{self.needles}" if self.kind == "reasoning" else ""
        return f"{self.kind}{count}_{ENDINGS[self.language]}"


class AskedNeedles(NamedTuple):
    """One question before its haystack is made."""

    needles: list[str]
    question: str
    answers: list[str]
    prompt: str
    """With a place for the `{context}`; other braces are doubled."""


class Needles:
    """The facts and questions of some parts.

    Args:
        files: those of the data set among them.
        depths: how many facts `multi_retrieval` hides.
        released: folder of v2's code, for its reasoning.

    Raises:
        DataError: a file is missing, or holds something else.
    """

    def __init__(
        self,
        version: Version,
        parts: Sequence[NeedlePart],
        files: Sequence[Path],
        *,
        depths: int,
        released: Path | None,
    ) -> None:
        self._version: Version = version
        self._files, self._depths = files, depths
        self._rows: dict[Language, list[dict[str, str]]] = {}
        self._sets: dict[Language, list[dict[str, str]]] = {}
        self._records: dict[Language, list[Any]] = {}
        self._persons: dict[Language, list[str]] = {}
        self._relations: dict[Language, Relations] = {}
        self._reasoning: dict[Language, tuple[str, str]] = {}
        self._read: dict[str, str] = {}
        for part in parts:
            if part.kind != "reasoning":
                self._read_needles(part)
            elif version == "v1":
                self._read_records(part)
            else:
                assert released is not None
                self._read_relations(part, released)

    @property
    def sha256(self) -> str:
        """SHA-256 of all that is read."""
        known = [sorted(self._read.items()), self._relations, self._reasoning]
        return sha256_bytes(repr(known).encode())

    def asked(self, part: NeedlePart, sample: int) -> AskedNeedles:
        """Return what a sample asks."""
        draw, language = random.Random(sample), part.language
        if part.kind == "single_retrieval":
            rows = [draw.choice(self._rows[language])]
            question = rows[0]["retrieval_question"]
        elif part.kind == "multi_retrieval":
            rows = list(self._sets[language])
            draw.shuffle(rows)
            question = _joined([row["retrieval_question"] for row in rows], language)
        else:
            return self._chain(part, draw)
        prompt = self._prompt(part).replace("{question}", _doubled(self._guided(question, language)))
        return AskedNeedles([row["needle"] for row in rows], question, [row["arg2"] for row in rows], prompt)

    def _chain(self, part: NeedlePart, draw: random.Random) -> AskedNeedles:
        language = part.language
        if self._version == "v1":
            record = draw.choice(_of_length(self._records[language], part.needles))
            question = str(record["question"])
            guided = question + rules()["guide"][language]
            prompt = self._prompt(part).replace("{question}", _doubled(guided))
            return AskedNeedles(
                [str(each) for each in record["derivations"]], question, [str(record["answer"])], prompt
            )
        chain = self._relations[language].chain(draw, self._persons[language], part.needles)
        asked, prompt = self._reasoning[language]
        question = asked.format(last_person=chain.names[-1])
        for place, text in (("{retrieval_question}", question), ("{last_person}", chain.names[-1])):
            prompt = prompt.replace(place, _doubled(text))
        return AskedNeedles(chain.relations, question, [chain.names[0]], prompt)

    def _prompt(self, part: NeedlePart) -> str:
        return str(rules()["prompts"][self._version][part.language][part.kind])

    def _guided(self, question: str, language: Language) -> str:
        """Return a question with v1's advice in it, before it says how to answer."""
        if self._version != "v1":
            return question
        asked = rules()["asked"][language]
        before, behind, *_ = _parted(question, asked["mark"], language)
        return f"{before}{rules()['guide'][language]}{asked['before_mark']}{asked['mark']}{behind}"

    def _read_needles(self, part: NeedlePart) -> None:
        language, path = part.language, self.file("needles.jsonl")
        rows = Rows(path)
        texts = [
            {**dict(zip(_NEEDLE, texts_in(rows, number, *_NEEDLE))), "arg1": str(row.get("arg1", ""))}
            for number, row in enumerate(rows)
        ]
        found = [row for row in texts if row["language"] == language]
        if empty := [row for row in found if not row["needle"] or not row["arg2"]]:
            raise DataError(f"{path} holds a needle without text or answer", found=str(empty[0])[:200])
        if not found:
            raise DataError(f"{path} holds no {language} needles")
        self._rows[language] = found
        if part.kind == "multi_retrieval":
            random.Random(0).shuffle(texts)
            self._sets[language] = _distinct(
                [row for row in texts if row["language"] == language], self._depths
            )
            if len(self._sets[language]) < self._depths:
                raise DataError(
                    f"{path} holds too few needles that differ for {self._depths} depths",
                    found=f"{len(self._sets[language])} in {language}",
                )

    def _read_records(self, part: NeedlePart) -> None:
        path = self.file(f"multi_needle_reasoning_{ENDINGS[part.language]}.json")
        records = read_json(path)
        try:
            chains = _of_length(records, part.needles)
            whole = all(
                isinstance(record["question"], str)
                and str(record["answer"]).split()
                and record["derivations"]
                for record in chains
            )
        except (TypeError, KeyError, AttributeError):
            chains, whole = [], False
        if not whole or not chains:
            raise DataError(
                f"{path} holds no chains of {part.needles} facts",
                allowed="records with derivations, derivation_count, question and answer",
            )
        self._records[part.language] = records

    def _read_relations(self, part: NeedlePart, released: Path) -> None:
        language = part.language
        self._relations[language] = relations_in(released / "atc.py", language)
        self._reasoning[language] = _reasoning_texts(released / "multi.py", language)
        self._persons[language] = names_of(
            {"names.json": self.file("names.json")}, language, needed=part.needles + 1
        )

    def file(self, name: str) -> Path:
        """Return a file of the data set. Raises DataError: it is not there."""
        found = [path for path in self._files if path.name == name]
        if len(found) != 1:
            raise DataError(
                f"{name} of NeedleBench is {'there more than once' if found else 'not there'}",
                found=", ".join(str(path) for path in found or self._files),
                fix="longspan data fetch opencompass/NeedleBench --out FOLDER, then --data FOLDER",
            )
        if name not in self._read:
            self._read[name] = sha256_file(found[0])
        return found[0]


def _of_length(records: Sequence[Any], count: int) -> list[Any]:
    return [record for record in records if record.get("derivation_count") == count]


def _distinct(rows: Sequence[dict[str, str]], count: int) -> list[dict[str, str]]:
    """Return the first needles of which no two share a subject or an answer."""
    found: list[dict[str, str]] = []
    for row in rows:
        if all(row["arg1"] != other["arg1"] and row["arg2"] != other["arg2"] for other in found):
            found.append(row)
    return found[:count]


def _joined(questions: Sequence[str], language: Language) -> str:
    """Return several questions as one: what each asks, then how to answer all."""
    asked = rules()["asked"][language]
    end, sentence = asked["question_end"], asked["sentence_end"]
    whats = asked["joint"].join(question.split(end)[0] + end for question in questions)
    hows = asked["joint"].join(
        _parted(question, "'", language)[1].split(sentence)[0] for question in questions
    )
    return whats + str(asked["format"]).replace("{format}", hows)


def _parted(question: str, mark: str, language: Language) -> list[str]:
    """Return a question parted where it says how to answer. Raises DataError: it does not."""
    if mark not in question:
        how = rules()["asked"][language]["format"]
        raise DataError(
            "a needle's question does not say how to answer", found=question, allowed=f"... {how}"
        )
    return question.split(mark)


def _reasoning_texts(path: Path, language: Language) -> tuple[str, str]:
    """Return question and prompt of v2's reasoning, as the released multi.py writes them (parsed, never run)."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read", found=f"{type(error).__name__}: {error}") from None
    found: dict[tuple[str, ...], str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        text, names = _template(node)
        chinese = any("\u4e00" <= letter <= "\u9fff" for letter in text)
        if chinese == (language == "Chinese"):
            found.setdefault(tuple(dict.fromkeys(names)), text)
    question, prompt = found.get(("last_person",)), found.get(_PLACES)
    if question is None or prompt is None:
        raise DataError(
            f"{path} does not hold question and prompt of the reasoning task in {language}",
            allowed="the released opencompass/datasets/needlebench_v2/multi.py",
        )
    return question, prompt


def _template(node: ast.JoinedStr) -> tuple[str, list[str]]:
    """Return an f-string as a text with places, and the names that it puts there."""
    parts, names = [], []
    for value in node.values:
        if isinstance(value, ast.Constant):
            parts.append(_doubled(str(value.value)))
        elif isinstance(value, ast.FormattedValue) and isinstance(value.value, ast.Name):
            names.append(value.value.id)
            parts.append(f"{{{value.value.id}}}")
    return "".join(parts), names


def _doubled(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
