"""One set from documents to training samples.

    OUT/config.yaml       settings; the same command goes on, another one is refused
        documents.jsonl   the chosen documents
        answers.sqlite    every answer, as it came
        asked.jsonl       questions that are supported by the text and not asked twice, by document
        questions.jsonl   of these, the ones that cannot be answered without it
        rejected.jsonl    the others, each with a reason
        train.jsonl       the samples, for `longspan train`
        summary.json      all counts
        depth.png         where the evidence lies
        job.lock          held while a process is at work here; a second one stops

Every file but the answers is made whole, in the order of the documents, and is a function of settings, documents and
answers: a killed job that goes on writes the same bytes as one that was not.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longspan.api import Client
from longspan.core.errors import DataError, RunError, UserError
from longspan.core.files import read_json, write_json
from longspan.core.log import get_logger
from longspan.core.progress import Progress, progress
from longspan.core.records import read_jsonl
from longspan.core.rundir import RunDir
from longspan.core.seeds import rng
from longspan.data.chat import BRANCHES
from longspan.data.jobs.job_lock import JobLock
from longspan.synth.asking import Asker, Group, ask_groups
from longspan.synth.claims import UsedDocuments
from longspan.synth.config import SetConfig
from longspan.synth.conversation import Composer, Conversation
from longspan.synth.figure import draw_depths
from longspan.synth.filters import NearDuplicates, content_words, knows
from longspan.synth.items import Item, Rejected, Shown, read_reply
from longspan.synth.job_config import Student, SynthConfig
from longspan.synth.offline import make_questions, turn_tokens
from longspan.synth.output import Reject, rejected_lines, write_lines
from longspan.synth.sections import TokenRuler
from longspan.synth.selection import DocumentFile, Selected, select_documents

CONFIG, SUMMARY, LOCK = "config.yaml", "summary.json", "job.lock"
_log = get_logger("synth")


class SynthJob:
    """A job in the folder `out`.

    Args:
        client: None for a set of kind `offline`.
        used: the documents that other sets have.
    """

    def __init__(
        self,
        settings: SynthConfig,
        out: Path,
        student: Student,
        *,
        client: Client | None,
        used: UsedDocuments,
    ) -> None:
        self.settings, self.out = settings, out
        self._spec, self._student = settings.set, student
        self._client, self._used = client, used
        self._documents = DocumentFile(out / "documents.jsonl")
        self._questions: Counter[str] = Counter()
        self._repairs: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()

    def run(self) -> dict[str, Any]:
        """Do what is not done yet and return the summary; a job that is complete only returns it.

        Raises:
            ConfigError: `out` holds a job with other settings.
            DataError: the inputs are missing, or none of them is fit.
            UserError: the endpoint refuses the key or has no such model.
            RunError: the budget is used up, the endpoint does not answer, the disk is full, or another process is at
                work in `out`.
        """
        with JobLock(self.out / LOCK, what=str(self.out)):
            return self._run()

    def _run(self) -> dict[str, Any]:
        # Documents first: a filter that lets nothing pass leaves no folder that would refuse a milder one.
        selected = None if (self.out / CONFIG).exists() else self._select()
        run = RunDir.create(self.out, self.settings, seed=self.settings.seed)
        if run.is_complete:
            _log.info("%s is complete", self.out)
            summary: dict[str, Any] = read_json(self.out / SUMMARY)
            return summary
        selected = selected or self._selected_before() or self._select()
        if self._spec.kind != "offline":
            try:
                self._question(run, selected)
            except UserError:
                if not self._requests:
                    # The same for a wrong key or name of a model, found before any answer.
                    (self.out / CONFIG).unlink()
                raise
        with run.phase("samples"):
            summary = self._write_samples(selected)
        write_json(self.out / SUMMARY, summary)
        if not summary["failed"] and summary["samples"]["written"]:
            run.mark_complete()
        return summary

    def _question(self, run: RunDir, selected: Selected) -> None:
        with rejected_lines(self.out / "rejected.jsonl") as reject:
            with run.phase("questions"):
                self._ask(selected, reject)
            with run.phase("leak check"):
                self._check_leaks(reject)

    def _select(self) -> Selected:
        selected = select_documents(
            self.settings.reads,
            self._spec,
            self._student.tokenizer,
            self._documents.path,
            seed=self.settings.seed,
            owner=self._used.owner_in(self.out),
            used=self._used,
        )
        if not selected.documents:
            raise DataError(
                f"no document is fit for {self._spec.name}",
                found=", ".join(f"{count:,} {name}" for name, count in selected.counts.items()) or "nothing",
                allowed=f"{_limits(self._spec)}, language {self._spec.language or 'any'}",
                fix="change the limits (--min-tokens, --max-tokens, --language), or give other documents",
            )
        write_json(self.out / "documents.json", selected._asdict())
        return selected

    def _selected_before(self) -> Selected | None:
        counts = self.out / "documents.json"
        whole = counts.exists() and self._documents.path.exists()
        return Selected(**read_json(counts)) if whole else None

    def _ask(self, selected: Selected, reject: Reject) -> None:
        assert self._client is not None, "a set that asks has a client"
        asker = Asker(self._spec, self._student.tokenizer, length=self.settings.sample.length)
        asked_before = NearDuplicates()

        def groups() -> Iterator[Group[_Asked]]:
            for number, document in enumerate(self._documents):
                shown = asker.shown(document)
                yield Group(_Asked(number, document["id"], shown), [asker.request(each) for each in shown])

        def lines(bar: Progress) -> Iterator[dict[str, Any]]:
            assert self._client is not None
            for about, results in ask_groups(self._client, groups(), self._counter(bar)):
                own = NearDuplicates()
                kept: list[Item] = []
                for shown, result in zip(about.shown, results):
                    self._requests[result.error or "answered"] += 1
                    if result.error is not None:
                        reject(about.document, f"request: {result.error}", result.detail)
                        continue
                    for item in read_reply(result.text, shown, self._spec, self._repairs):
                        self._questions["returned"] += 1
                        if isinstance(item, Item):
                            item = self._new(item, own, asked_before)
                        if isinstance(item, Rejected):
                            self._questions[item.reason] += 1
                            reject(about.document, item.reason, item.text)
                        else:
                            kept.append(item)
                yield _questions_line(about.number, about.document, kept)

        total = _num_requests(selected, asker)
        with progress(f"ask {self._spec.name}", total=total, unit="requests") as bar:
            write_lines(self.out / "asked.jsonl", lines(bar))

    def _new(self, item: Item, own: NearDuplicates, others: NearDuplicates) -> Item | Rejected:
        words = content_words(item.question, self._spec.language)
        if not own.add(words):
            return Rejected("nearly the same question as another", item.question)
        if self._spec.duplicates == "set" and not others.add(words):
            return Rejected("nearly the same question as that of another document", item.question)
        return item

    def _check_leaks(self, reject: Reject) -> None:
        source = self.out / "asked.jsonl"
        if not self.settings.leak_check:
            write_lines(self.out / "questions.jsonl", read_jsonl(source))
            return
        assert self._client is not None, "a set that asks has a client"
        asker = Asker(self._spec, self._student.tokenizer, length=self.settings.sample.length)
        total = sum(len(record["items"]) for record in read_jsonl(source))

        def groups() -> Iterator[Group[dict[str, Any]]]:
            for record in read_jsonl(source):
                items = [Item.from_dict(item) for item in record["items"]]
                yield Group({**record, "items": items}, [asker.closed_book(item) for item in items])

        def lines(bar: Progress) -> Iterator[dict[str, Any]]:
            assert self._client is not None
            for record, results in ask_groups(self._client, groups(), self._counter(bar)):
                kept = []
                for item, result in zip(record["items"], results):
                    self._requests[f"leak check: {result.error or 'answered'}"] += 1
                    if result.error is None and knows(result.text, item.answer, self._spec.language):
                        self._questions["known without the document"] += 1
                        reject(record["id"], "known without the document", item.question)
                    else:
                        kept.append(item)
                yield _questions_line(record["document"], record["id"], kept)

        with progress("leak check", total=total, unit="questions") as bar:
            write_lines(self.out / "questions.jsonl", lines(bar))

    def _counter(self, bar: Progress) -> Callable[[], None]:
        """Return what is called after every result: it moves the bar and shows what was spent."""
        client = self._client
        assert client is not None

        def count() -> None:
            cost = client.report().cost
            if cost is not None:
                bar.note(f"cost {cost:.4g}")
            bar.advance()

        return count

    def _write_samples(self, selected: Selected) -> dict[str, Any]:
        composer = Composer(
            self.settings.sample,
            self._student.tokenizer,
            self._student.chat,
            self._documents,
            seed=self.settings.seed,
        )
        lengths: list[int] = []
        turns = 0

        def lines(bar: Progress) -> Iterator[dict[str, Any]]:
            nonlocal turns
            for number, document, items in self._by_document():
                bar.advance()
                if not items:
                    composer.left_out["sample: no question left"] += 1
                    continue
                sample = composer.compose(number, document, items)
                if sample is not None:
                    lengths.append(sample.length)
                    turns += len(sample.items)
                    yield self._record(document, sample)

        with progress("write samples", total=selected.documents, unit="documents") as bar:
            write_lines(self.out / "train.jsonl", lines(bar))
        left_out = composer.left_out
        for name, count in left_out.items():
            if name.startswith("question: ") and count:
                self._questions[name.removeprefix("question: ")] += count
        self._questions["in samples"] = turns
        counts = [int(count) for count in composer.balance.counts]
        draw_depths(counts, self.out / "depth.png", title=f"{self._spec.name}: {sum(counts):,} places")
        samples = {"written": len(lengths)}
        samples |= {
            name.removeprefix("sample: "): count
            for name, count in left_out.items()
            if name.startswith("sample: ")
        }
        return {
            "set": self._spec.name,
            "model": self.settings.model,
            "documents": selected.counts,
            "requests": dict(self._requests),
            "client": self._client.report()._asdict() if self._client is not None else None,
            "repairs": dict(self._repairs),
            "questions": {name: count for name, count in self._questions.items() if count},
            "samples": samples,
            "tokens": _quantiles(lengths),
            "depth": {"counts": counts, "distance": _distance(counts)},
            "failed": self._requests["failed"] + self._requests["leak check: failed"],
            "out": str(self.out / "train.jsonl"),
        }

    def _by_document(self) -> Iterator[tuple[int, Mapping[str, Any], list[Item]]]:
        if self._spec.kind == "offline":
            for number, document in enumerate(self._documents):
                yield number, *self._offline(number, document)
            return
        for record in read_jsonl(self.out / "questions.jsonl"):
            items = [Item.from_dict(item) for item in record["items"]]
            yield record["document"], self._documents[record["document"]], items

    @property
    def _offline_form(self) -> dict[str, bool]:
        return {"in_sentences": self._spec.in_sentences, "chains": self._spec.chains}

    @functools.cached_property
    def _turn_tokens(self) -> float:
        """About how many tokens an offline question takes, the same in every document."""
        return turn_tokens(self._student.tokenizer, self._student.chat, **self._offline_form)

    def _offline(self, number: int, document: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Item]]:
        """Return a document, cut to what fits, with facts planted in it, and questions on it."""
        count, length = self._spec.questions, self.settings.sample.length
        ruler = TokenRuler(document["text"], self._student.tokenizer)
        room = max(length // 2, length - round(self._turn_tokens * (count + 1)))
        text = document["text"]
        if ruler.tokens > room:
            share = float(rng(self.settings.seed, "synth", "window", document["id"]).random())
            start = ruler.last_before(share * (ruler.tokens - room))
            text = text[start : ruler.last_before(float(ruler.before([start])[0]) + room)]
        made = make_questions(
            number, {**document, "text": text}, count, seed=self.settings.seed, **self._offline_form
        )
        self._questions.update(made.kinds)
        return {**document, "text": made.text}, made.items

    def _record(self, document: Mapping[str, Any], sample: Conversation) -> dict[str, Any]:
        return {
            "conversations": sample.turns,
            **({BRANCHES: sample.branches} if sample.branches else {}),
            "set": self._spec.name,
            "prompt": self._spec.template().label if self._spec.prompt else None,
            "model": self.settings.model,
            "document": document["id"],
            "source": document["source"],
            "path": document["path"],
            "length": sample.length,
            "context_tokens": sample.context_tokens,
            "depths": sample.depths,
            "sections": [list(item.sections) for item in sample.items],
            "distractors": sample.distractors,
        }


class _Asked(NamedTuple):
    number: int
    document: str
    """Its hash."""
    shown: list[Shown]


def require_samples(summary: Mapping[str, Any]) -> None:
    """Raise RunError where a job has come to less than it should have, saying why."""
    if summary["failed"]:
        raise RunError(
            f"{summary['failed']:,} requests failed for now; their questions are missing",
            fix="run the same command again: it asks for these alone",
        )
    if not summary["samples"]["written"]:
        parts = ("documents", "requests", "questions", "samples")
        found = "; ".join(
            f"{part}: " + (", ".join(f"{count:,} {name}" for name, count in summary[part].items()) or "none")
            for part in parts
        )
        raise RunError(
            "0 samples came out of it",
            found=found,
            fix="look into rejected.jsonl for what was left out",
        )


def _limits(spec: SetConfig) -> str:
    most = "any number of" if spec.max_tokens is None else f"{spec.max_tokens:,}"
    return f"{spec.min_tokens:,} to {most} tokens"


def _num_requests(selected: Selected, asker: Asker) -> int:
    """Return about how many requests there are, for the time left."""
    if asker.spec.kind == "one_detail":
        return min(selected.sections, selected.documents * asker.reach)
    return selected.documents * (asker.spec.requests_per_document or 1)


def _questions_line(number: int, name: str, items: Sequence[Item]) -> dict[str, Any]:
    return {"document": number, "id": name, "items": [item.to_dict() for item in items]}


def _quantiles(lengths: Sequence[int]) -> dict[str, int] | None:
    if not lengths:
        return None
    p10, p50, p90 = (int(value) for value in np.quantile(lengths, (0.1, 0.5, 0.9)))
    return {
        "total": sum(lengths),
        "min": min(lengths),
        "p10": p10,
        "p50": p50,
        "p90": p90,
        "max": max(lengths),
    }


def _distance(counts: Sequence[int]) -> float | None:
    """Return the largest difference between the share of evidence up to a depth and that depth (Kolmogorov)."""
    total = sum(counts)
    if not total:
        return None
    shares = np.cumsum(counts) / total
    even = np.arange(1, len(counts) + 1) / len(counts)
    return round(float(np.abs(shares - even).max()), 4)
