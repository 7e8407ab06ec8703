"""HELMET's released folders: recall, RULER, RAG, re-ranking, citations; ICL, long QA, summaries from their data sets.

    ROOT/json_kv/test_k1800_dep6.jsonl                     context, question, answer, demos, num_kvs
    ROOT/ruler/niah_multikey_2/validation_131072.jsonl     context, query, type_needle_v, answer or outputs
    ROOT/kilt/nq-dev-multikilt_1000_k1000_dep6.jsonl       question, answers, ctxs (title, text); demos beside it
    ROOT/trec/train.jsonl, test.jsonl                      text, coarse_label, fine_label; others likewise
    ROOT/msmarco/test_reranking_data_k1000_dep3.jsonl      qid, query, ctxs (id, text, label)
    ROOT/alce/asqa_eval_gtr_top2000.json                   question, qa_pairs, annotations, docs (title, text)
    ROOT/../prompts/asqa_revised.json                      instruction, doc_prompt, demo_prompt, demos
    ROOT/infinitebench/longbook_qa_eng.jsonl, ROOT/narrativeqa/test.jsonl, ROOT/multi_lexsum/validation.jsonl

Which questions are asked, which examples stand before them and how labels are renamed is drawn as HELMET draws
it (seed 42, SHA-256 of the question, the orders of `datasets` and `random`), so questions and prompts are those of
its published runs; templates, sizes and metrics are data (helmet.yaml). Different here: contexts are cut by
the model's tokenizer where HELMET takes Llama-2's, and answers do not end at a new line, which HELMET's
configurations ask for by a name that it does not know. Summaries are scored by ROUGE-L until a judge
scores them, answers with citations by what they say until `eval.citations` has judged what they cite.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.core.errors import ArgumentError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.released.helmet_cite import Cite
from longspan.eval.released.helmet_set import LENGTHS, SEED, HelmetSet, seed_of, shuffled
from longspan.eval.released.longllm import read_settings
from longspan.eval.released.rows import Rows, find_rows, texts_of

CATEGORIES = ("recall", "rag", "rerank", "cite", "icl", "longqa", "summ", "ruler")
_LONG = 65536
_PASSAGE = "Document (Title: {title}): {text}"


def open_sets(
    root: Path, category: str, names: Sequence[str] = (), *, length: int = 131072, tokenizer: Tokenizer
) -> list[HelmetSet]:
    """Open the sets of one category.

    Args:
        category: one of CATEGORIES.
        names: sets of it; none: all.
        length: tokens of prompt and answer; one of LENGTHS.
        tokenizer: counts the tokens of stories, of which the short ones are left out.

    Raises:
        ArgumentError: there is no such set or length.
        DataError: a file is missing.
    """
    if length not in LENGTHS:
        raise ArgumentError("HELMET has no files for this input length", found=length, allowed=LENGTHS)
    settings = read_settings("helmet.yaml")[category]
    known = settings["datasets"]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ArgumentError(f"{category} has no such set", found=", ".join(unknown), allowed=list(known))
    kinds: dict[str, type[HelmetSet]] = {
        "json_kv": JsonKV,
        "rag": Rag,
        "rerank": Rerank,
        "cite": Cite,
        "icl": Icl,
    }
    kinds |= {
        "narrativeqa": NarrativeQA,
        "longqa": InfiniteQA,
        "multi_lexsum": LexSum,
        "summ": InfiniteSummary,
    }
    sets = []
    for name in names or known:
        kind = kinds.get(name) or kinds.get(category) or HelmetRuler
        each = {**known[name], "name": name, "max_samples": settings["max_samples"]}
        sets.append(kind(root, category, each, length, tokenizer))
    return sets


class JsonKV(HelmetSet):
    """A value in a long JSON object, asked by its key; two of its other pairs are shown first."""

    def _example(self, place: int) -> tuple[dict[str, str], list[str]]:
        rows = self._rows
        pairs = rows.field(place, "demos")[: self._shots]
        demos = "".join(f"Key: {key}\nCorresponding value: {value}\n\n" for key, value in pairs)
        values = {"context": rows.field(place, "context"), "question": rows.field(place, "question")}
        return {**values, "demos": demos}, texts_of(rows.field(place, "answer"))


class HelmetRuler(HelmetSet):
    """A task of RULER."""

    def _example(self, place: int) -> tuple[dict[str, str], list[str]]:
        row = self._rows[place]
        values = {name: str(value) for name, value in row.items() if isinstance(value, str | int)}
        values["question"] = str(row.get("query", row.get("question", "")))
        values["example"] = f"{row['example']}\n\n" if row.get("example") else ""
        self._rows.field(place, "context")
        return values, texts_of(row["answer"] if "answer" in row else self._rows.field(place, "outputs"))


class Rag(HelmetSet):
    """Questions on many retrieved passages; two answered questions with three passages each stand first."""

    def _open(self) -> None:
        self._rows, self._demos = self._file("file"), self._file("demo_file").load()
        chosen, self._demo_places = (self._popular(rows) for rows in (self._rows, self._demos))
        self._key = "id" if len(self._rows) and "id" in self._rows[0] else "question"
        keys = [self._rows.field(place, self._key) for place in chosen]
        different = sorted(set(keys))
        count = min(self._settings["max_samples"], len(different))
        # Questions are drawn; each stands in the file with its answer at several depths, and all are asked.
        drawn = set(random.Random(SEED).sample(different, count))
        self._chosen = [place for place, key in zip(chosen, keys) if key in drawn]

    def _popular(self, rows: Rows) -> list[int]:
        limit = self._settings.get("popularity")
        if limit is None:
            return list(range(len(rows)))
        return [place for place in range(len(rows)) if math.log10(rows.field(place, "s_pop")) < limit]

    def _example(self, place: int) -> tuple[dict[str, str], list[str]]:
        rows = self._rows
        demos = "".join(
            f"{_passages(demo['ctxs'])}\n\nQuestion: {demo['question']}\nAnswer: {demo['answers'][0]}\n\n"
            for demo in self._shown(rows.field(place, self._key))
        )
        question, passages = rows.field(place, "question"), _passages(rows.field(place, "ctxs"))
        values = {"context": passages, "question": question, "demos": demos}
        return values, texts_of(rows.field(place, "answers"))

    def _shown(self, key: Any) -> list[dict[str, Any]]:
        places = self._demo_places
        if self._settings.get("popularity") is not None:  # examples and questions are of one file
            places = [place for place in places if self._demos[place][self._key] != key]
        shown: dict[Any, dict[str, Any]] = {}
        for number in shuffled(len(places), seed_of(str(key))):
            row = self._demos[places[number]]
            shown.setdefault(row[self._key], row)
            if len(shown) == self._shots:
                break
        return list(shown.values())


class Rerank(HelmetSet):
    """Passages to be put in the order of their relevance; two questions with ten passages each stand first."""

    def _open(self) -> None:
        self._rows, demos = self._file("file"), self._file("demo_file").load()
        ids = [self._rows.field(place, "qid") for place in range(len(self._rows))]
        different = sorted(set(ids))
        drawn = set(random.Random(SEED).sample(different, min(self._settings["max_samples"], len(different))))
        self._chosen = [place for place, id_ in enumerate(ids) if id_ in drawn]
        others = [demo for demo in demos if demo["qid"] not in drawn]
        # As published: those of all that are asked go if enough are left, else that of the question alone.
        self._whole = len(demos) <= 2 * len(self._chosen)
        self._demos = list(demos) if self._whole else others

    def _example(self, place: int) -> tuple[dict[str, str], list[str]]:
        query, own = self._rows.field(place, "query"), self._rows.field(place, "qid")
        demos = [demo for demo in self._demos if demo["qid"] != own] if self._whole else self._demos
        shown: dict[str, dict[str, Any]] = {}
        for number in shuffled(len(demos), seed_of(own)):
            shown.setdefault(demos[number]["qid"], demos[number])
            if len(shown) == self._shots:
                break
        texts = [
            f"{_ranked(demo['ctxs'])}\n\nQuery: {demo['query']}\nRanking: {_ranking(demo['ctxs'])}\n\n"
            for demo in shown.values()
        ]
        passages = self._rows.field(place, "ctxs")
        values = {"context": _ranked(passages), "question": query, "demos": "".join(texts)}
        return values, [_ranking(passages)]

    def _more(self, place: int) -> dict[str, Any]:
        return {
            "relevant": {each["id"]: each["label"] for each in self._rows[place]["ctxs"] if each["label"]}
        }


class Icl(HelmetSet):
    """Classification by many examples whose labels are numbers drawn anew for each question."""

    def _open(self) -> None:
        folder, split = self._settings["folder"], self._settings.get("test_split", "test")
        self._train = self._split(folder, "train")
        self._train_places = list(range(len(self._train)))
        if split is None:  # one file: a tenth of it, drawn, is asked
            order = shuffled(len(self._train), SEED)
            tested = math.ceil(0.1 * len(order))
            self._rows, test, self._train_places = self._train, order[:tested], order[tested:]
        else:
            self._rows = self._split(folder, split)
            test = list(range(len(self._rows)))
        most = self._settings["max_samples"]
        if len(test) > most:
            test = [test[number] for number in shuffled(len(test), SEED)]
            test = self._balanced(self._rows, test, most, SEED)
        self._chosen = test

    def size(self, number: int) -> int:
        """Return about how many bytes the question has: the examples fill the length."""
        return 4 * self._length

    def _split(self, folder: str, split: str) -> Rows:
        ends = ("jsonl", "json", "parquet")
        places = [f"{root}{folder}/{split}*.{end}" for root in ("", "icl/") for end in ends]
        return find_rows(self._root, places, what=f"{self.dataset}/{self.subtask}").load()

    def _balanced(self, rows: Rows, places: Sequence[int], count: int, seed: int) -> list[int]:
        """Draw `count` rows, every label about as often, in sets that hold each label once."""
        drawn = random.Random(seed)
        by_label: dict[Any, list[int]] = {}
        for place in places:
            by_label.setdefault(rows.field(place, self._settings["label_field"]), []).append(place)
        rounds = math.ceil(count / len(by_label))
        sets: list[list[int]] = [[] for _ in range(rounds)]
        for members in by_label.values():
            chosen = drawn.sample(range(len(members)), rounds % len(members))
            while len(chosen) < rounds:
                chosen += drawn.sample(range(len(members)), min(rounds - len(chosen), len(members)))
            for each, number in zip(sets, chosen):
                each.append(members[number])
        for each in sets:
            drawn.shuffle(each)
        return [place for each in sets for place in each][:count]

    def _example(self, place: int) -> tuple[dict[str, str], list[str]]:
        field = self._settings["label_field"]
        text = self._rows.field(place, "text")
        seed = (int(hashlib.sha256(text.encode("utf-8")).hexdigest(), 16) + SEED) % 2**31
        shown = self._balanced(self._train, self._train_places, self._settings["k"][self._length], seed)
        names = list(range(self._settings["num_labels"]))
        random.Random(seed).shuffle(names)
        context = "\n\n".join(
            f"{row['text']}\nlabel: {names[int(row[field])]}" for row in (self._train[each] for each in shown)
        )
        answer = str(names[int(self._rows.field(place, field))])
        return {"context": context, "question": text}, [answer]


class InfiniteQA(HelmetSet):
    """InfiniteBench's questions on novels, free or by choice; answered questions on others stand first."""

    def _open(self) -> None:
        super()._open()
        # Each row holds a novel: what examples show of it is read once.
        self._ids = [row.get("id") for row in self._rows]
        self._demos = [self._demo(place) for place in range(len(self._rows))]

    def _example(self, place: int) -> tuple[dict[str, str], list[str]]:
        values, expected = self._values(place)
        others = [demo for id_, demo in zip(self._ids, self._demos) if id_ != self._ids[place]]
        shown = [others[number] for number in shuffled(len(others), SEED)[: self._shots]]
        demos = "\n\n".join(shown)
        if shown:
            demos = f"For example:\n\n{demos}\n\nNow, read the following story:\n\n"
        return {**values, "context": self._rows.field(place, "context"), "demos": demos}, expected

    def _demo(self, place: int) -> str:
        values, expected = self._values(place)
        options = f"\nOptions:\n{values['options']}" if values["options"] else ""
        return f"[story text]\nQuestion: {values['question']}{options}\nAnswer: {expected[0]}"

    def _values(self, place: int) -> tuple[dict[str, str], list[str]]:
        question, answers = self._rows.field(place, "input"), texts_of(self._rows.field(place, "answer"))
        if self._settings["metric"] != "helmet_choice":
            return {"question": question, "options": ""}, answers
        options = texts_of(self._rows.field(place, "options"))
        letter = "ABCD"[options.index(answers[0])]
        lines = [f"{name}. {option}" for name, option in zip("ABCD", options)]
        return {"question": question, "options": "\n".join(lines)}, [letter, f"{letter}. {answers[0]}"]


class InfiniteSummary(InfiniteQA):
    """InfiniteBench's novels, to be summarised; summaries of others stand first."""

    def _demo(self, place: int) -> str:
        return f"[story text]\nSummary: {texts_of(self._rows.field(place, 'answer'))[0].strip()}"


class LexSum(HelmetSet):
    """The documents of lawsuits, to be summarised: those of at least 65,536 tokens, with two summaries before them."""

    def _open(self) -> None:
        self._rows, train = self._file("file"), self._file("demo_file")
        self._summaries = [row["summary/short"] for row in train if row["summary/short"] is not None]
        asked = [
            place
            for place, row in enumerate(self._rows)
            if row["summary/short"] is not None and len(self._tokenizer.encode(_lawsuit(row))) >= _LONG
        ]
        most = self._settings["max_samples"]
        if len(asked) > most:
            asked = [asked[number] for number in shuffled(len(asked), SEED)[:most]]
        self._chosen = asked

    def _example(self, place: int) -> tuple[dict[str, str], list[str]]:
        row = self._rows[place]
        # HELMET draws these without a seed; here they are the same for a question every time.
        drawn = shuffled(len(self._summaries), seed_of(row["summary/short"]))[: self._shots]
        shown = "\n\n".join(f"Summary: {self._summaries[number]}" for number in drawn)
        if drawn:
            shown = (
                f"Example summaries:\n\n{shown}\n\nNow, write a summary of the following legal documents.\n"
            )
        return {"context": _lawsuit(row), "question": "", "demos": shown}, [row["summary/short"]]


class NarrativeQA(HelmetSet):
    """Questions on whole novels and scripts, those of at least 131,072 tokens."""

    def _open(self) -> None:
        self._rows = self._file("file")
        self._train = self._file("demo_file")
        self._chosen: list[int] = []
        for place in shuffled(len(self._rows), SEED):
            if len(self._chosen) == self._settings["max_samples"]:
                break
            if len(self._tokenizer.encode(self._story(place))) > LENGTHS[-1]:
                self._chosen.append(place)

    def _story(self, place: int) -> str:
        return self._rows.field(place, "document")["text"]

    def _example(self, place: int) -> tuple[dict[str, str], list[str]]:
        row = self._rows[place]
        # HELMET draws these without a seed; here they are the same for a question every time.
        drawn = shuffled(len(self._train), seed_of(row["question"]["text"]))[: self._shots]
        demos = "\n\n".join(
            f"Question: {demo['question']['text']}\nAnswer: {demo['answers'][0]['text']}"
            for demo in (self._train[each] for each in drawn)
        )
        if drawn:
            demos = f"For example:\n\n{demos}\n\nNow, use the following story to answer the question:\n\n"
        values = {"context": self._story(place), "question": row["question"]["text"], "demos": demos}
        return values, [answer["text"] for answer in row["answers"]]


def _lawsuit(row: dict[str, Any]) -> str:
    return "\n\n".join(row["sources"])


def _ranking(passages: Sequence[dict[str, Any]]) -> str:
    return " > ".join(each["id"] for each in sorted(passages, key=lambda each: each["label"], reverse=True))


def _ranked(passages: Sequence[dict[str, Any]]) -> str:
    titled = "title" in passages[0]
    heads = (f"(Title: {each['title']})" if titled else "" for each in passages)
    return "\n\n".join(
        f"[ID: {each['id']}] Document{f' {head}' if head else ''}: {each['text']}"
        for head, each in zip(heads, passages)
    )


def _passages(passages: Sequence[dict[str, str]]) -> str:
    return "\n\n".join(_PASSAGE.format(title=each["title"], text=each["text"]) for each in passages)
