"""Whether the passages that an answer cites support it: ALCE's citation recall and precision, as HELMET counts them.

    cited = open_cited("run/records/harness-helmet-cite-model.jsonl", "judged/cite.jsonl", data_root="HELMET/data")
    judge_cited(cited, judge, name="my judge")

A sentence (of a list: a name) is right where the passages that it cites support it together; of several each has to be
needed. Who says so is a judge, any function of pairs of premise and hypothesis: `infer.entailment` runs the published
one, `server_judge` asks a chat model. What a judge does not say is counted and is no 0: the sample is then unscored.
"""

from __future__ import annotations

import contextlib
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longspan.api import ChatRequest, ChatResult, Client
from longspan.core.errors import ArgumentError, DataError
from longspan.eval.judge import REPLY_TOKENS, read_template
from longspan.eval.metrics_alce import SHORTEST, listed, one_line, sentences, splitter, without_citations
from longspan.eval.metrics_helmet import whole_answer
from longspan.eval.records import EvalRecords
from longspan.eval.released.helmet_cite import passages_file
from longspan.eval.released.rows import Rows
from longspan.eval.rescoring import open_for_rescoring, rescored_header, summarise, write_judged
from longspan.eval.scorers import scorer_named
from longspan.eval.summaries import mean_score

Pair = tuple[str, str]
"""Premise and hypothesis."""
Judge = Callable[[Sequence[Pair]], Sequence[bool | None]]
"""Says of each pair whether the premise supports the hypothesis; None: it does not say."""
VERSION = 1
"""Raised whenever the same verdicts would give another score."""
SERVER_TEMPLATE = "entails_v1"
_DATASET = "helmet_cite"
_MOST = 3
"""Citations of a sentence that count, the first ones."""
_METRICS = ("correctness", "citation_recall", "citation_precision")
_DIGITS = 9


class NotNowError(Exception):
    """A judge cannot be asked at the moment; the sample is left for the next call."""


class Citations(NamedTuple):
    """What the citations of one answer come to."""

    recall: float | None
    """Share of sentences that their passages support; None: there is no sentence, or one was not judged."""
    precision: float | None
    """Share of citations that support their sentence and are needed; 0 where there are none; None as above."""
    sentences: int
    asked: int
    """Pairs that were put to the judge."""
    unjudged: int
    """Those of which it said nothing."""


def citation_scores(texts: Sequence[str], passages: Sequence[Mapping[str, str]], judge: Judge) -> Citations:
    """Return recall and precision of sentences with their citations; [1] is the first of the passages."""
    claims = [without_citations(text).strip() for text in texts]
    cited = [_cited(text, len(passages)) for text in texts]
    asking = _Asking(judge)

    def premise(places: Sequence[int]) -> str:
        return "\n".join(_shown(passages[place]) for place in places)

    kept = [number for number, places in enumerate(cited) if places]
    whole = dict(zip(kept, asking([(premise(cited[number]), claims[number]) for number in kept])))
    several = [
        (number, place)
        for number in kept
        if whole[number] and len(cited[number]) > 1
        for place in cited[number]
    ]
    alone = asking([(premise([place]), claims[number]) for number, place in several])
    needless = [pair for pair, verdict in zip(several, alone) if verdict is False]
    without = asking([(premise(_others(cited[number], place)), claims[number]) for number, place in needless])
    single = [whole[number] for number in kept if len(cited[number]) == 1]
    # A citation that does not support its sentence alone is wrong where the others do so without it.
    known = [*single, *(verdict for verdict in alone if verdict is not False)]
    known += [None if verdict is None else not verdict for verdict in without]
    total = sum(map(len, cited))
    judged = None not in whole.values()
    return Citations(
        sum(map(bool, whole.values())) / len(texts) if judged and texts else None,
        _share(known, total) if judged and texts else None,
        len(texts),
        asking.asked,
        asking.unjudged,
    )


class Cited(NamedTuple):
    """Recorded answers with the passages that they cite."""

    source: EvalRecords
    rows: Mapping[str, Rows]
    """The file of each set that is asked."""
    out: Path


def open_cited(records: str | Path, out: str | Path, *, data_root: str | Path) -> Cited:
    """Return the answers of `records` with their passages: what is wrong with them is said before a judge is loaded.

    Args:
        out: where the judged ones are to be written.
        data_root: folder of HELMET's data, which holds the passages.

    Raises:
        ArgumentError, DataError: as `rescore`; or the records are of something else, or `data_root` holds other files
            than were asked.
    """
    source = open_for_rescoring(records, out)
    return Cited(source, _passages_of(source, Path(data_root)), Path(out))


def judge_cited(
    cited: Cited, judge: Judge, *, name: str, used: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write HELMET's citation samples with their citations judged; return a summary.

    A sample's score is the mean of its `metrics`: correctness, citation_recall, citation_precision. A killed run goes
    on with the samples that are missing in the file.

    Args:
        name: the judge's, for the header.

    Returns:
        as `rescore`, and by_metric (subtask, metric, samples, scored, mean, interval; over the samples that have it,
        as published) and judgements {asked, unjudged}.

    Raises:
        ConfigError: the file to be written holds something else.
        RunError: some samples could not be judged now; the same call asks for them again.
    """
    source, rows, out = cited
    header = rescored_header(source.header, {"name": "citations", "version": VERSION, "judge": name}, used)

    def judged(missing: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in missing:
            with contextlib.suppress(NotNowError):
                yield _judged(sample, rows[sample["subtask"]], judge)

    samples = write_judged(source, header, out, judged, doing="citations", says="verdicts")
    counts = [sample.get("citations") or {} for sample in samples]
    return {
        **summarise(header, out, samples),
        "by_metric": list(_by_metric(samples)),
        "judgements": {key: sum(each.get(key, 0) for each in counts) for key in ("asked", "unjudged")},
    }


def server_judge(client: Client) -> Judge:
    """Return a judge that asks a chat model; a reply that is neither 1 nor 0 says nothing."""
    template = string.Template(read_template(SERVER_TEMPLATE))

    def judge(pairs: Sequence[Pair]) -> list[bool | None]:
        texts = [template.substitute(premise=premise, hypothesis=hypothesis) for premise, hypothesis in pairs]
        requests = (ChatRequest(prompt=text, max_tokens=REPLY_TOKENS) for text in texts)
        replies = dict(client.complete(enumerate(requests)))
        if len(replies) < len(pairs) or any(reply.error == "failed" for reply in replies.values()):
            raise NotNowError
        return [_verdict(replies[number]) for number in range(len(pairs))]

    return judge


def _verdict(reply: ChatResult) -> bool | None:
    return None if reply.finish == "length" else {"1": True, "0": False}.get(reply.text.strip())


class _Asking:
    """A judge, and how much it was asked."""

    def __init__(self, judge: Judge) -> None:
        self._judge, self.asked, self.unjudged = judge, 0, 0

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[bool | None]:
        verdicts = self._judge(pairs) if pairs else []
        if len(verdicts) != len(pairs):
            raise ArgumentError(
                "a judge says something of every pair", found=f"{len(verdicts)} of {len(pairs)}"
            )
        self.asked += len(pairs)
        self.unjudged += sum(verdict is None for verdict in verdicts)
        return verdicts


def _cited(text: str, count: int) -> list[int]:
    """Return the places that a sentence cites; none where one of them does not exist."""
    marks = re.findall(r"\[(\d+)", text)
    if any(len(mark) > _DIGITS or int(mark) > count for mark in marks):
        return []
    return [int(mark) - 1 for mark in marks][:_MOST]  # [0] is the last passage, as published


def _others(places: Sequence[int], place: int) -> list[int]:
    rest = list(places)
    rest.remove(place)
    return rest


def _shown(passage: Mapping[str, str]) -> str:
    return f"Title: {passage['title']}\n{passage['sent' if 'sent' in passage else 'text']}"


def _share(known: Sequence[bool | None], total: int) -> float | None:
    return None if None in known else sum(map(bool, known)) / total if total else 0.0


def _passages_of(source: EvalRecords, root: Path) -> dict[str, Rows]:
    """Return the files of the sets that the records ask, which have to be those that were asked."""
    subtasks = sorted({sample.get("subtask", "") for sample in source.samples})
    sets = source.header["params"].get("sets") or {}
    if any(sample.get("dataset") != _DATASET for sample in source.samples) or not subtasks:
        raise ArgumentError(
            "the records hold no answers with citations",
            found=f"{source.header['task']}, {', '.join(sorted(sets)) or 'no set'}",
            allowed="those of `longspan eval harness --tasks helmet:cite`",
        )
    if "asqa" in subtasks:
        splitter()
    rows = {name: passages_file(root, name) for name in subtasks}
    for name, each in rows.items():
        if each.sha256 != (asked := sets[f"{_DATASET}/{name}"]["sha256"]):
            raise DataError(
                f"{each.path} is not the file that was asked",
                found=f"SHA-256 {each.sha256}",
                allowed=asked,
            )
    return rows


def _judged(sample: dict[str, Any], rows: Rows, judge: Judge) -> dict[str, Any]:
    if sample.get("unscored") is not None:
        return {**sample, "score": None}
    output = one_line(whole_answer(sample["output"], sample))
    if sample["subtask"] == "asqa":
        texts = [text for text in sentences(output) if len(text.strip()) >= SHORTEST]
    else:
        texts = [f"{sample['question']} {name}" for name in listed(output)]
    found = citation_scores(texts, rows.field(sample["place"], "docs"), judge)
    correct = scorer_named(sample["metric"]).score(sample["expected"], sample["output"], sample)
    metrics = dict(zip(_METRICS, (correct, found.recall, found.precision)))
    known = [value for value in metrics.values() if value is not None]
    reason = None
    if found.unjudged:
        reason = f"judge: nothing said of {found.unjudged} of {found.asked} pairs"
    elif not texts:
        reason = "no sentence to cite for"
    return {
        **sample,
        "metric": "citations",
        "metrics": metrics,
        "citations": found._asdict(),
        "score": sum(known) / len(known) if reason is None else None,
        "unscored": reason,
    }


def _by_metric(samples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for subtask in sorted({sample["subtask"] for sample in samples}):
        group = [sample.get("metrics") or {} for sample in samples if sample["subtask"] == subtask]
        for metric in _METRICS:
            scored = [{"score": each[metric]} for each in group if each.get(metric) is not None]
            yield {
                "subtask": subtask,
                "metric": metric,
                "samples": len(group),
                "scored": len(scored),
                **mean_score(scored),
            }
