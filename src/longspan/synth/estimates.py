"""What a job of questions would ask for at most, before it asks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from longspan.api import CostEstimate, Limits, Price, estimate
from longspan.synth.asking import Asker
from longspan.synth.claims import UsedDocuments
from longspan.synth.items import Item
from longspan.synth.job_config import Student, SynthConfig
from longspan.synth.selection import DocumentFile, Selected, select_documents


def estimate_job(
    settings: SynthConfig,
    student: Student,
    *,
    out: Path,
    used: UsedDocuments,
    price: Price | None,
    limits: Limits | None,
) -> tuple[Selected, CostEstimate, CostEstimate]:
    """Return the documents and what asking about them, and the leak check, would take at most; writes nothing."""
    spec, tokenizer = settings.set, student.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        documents = DocumentFile(Path(folder) / "documents.jsonl")
        selected = select_documents(
            settings.reads,
            spec,
            tokenizer,
            documents.path,
            seed=settings.seed,
            owner=used.owner_in(out),
            used=used,
            claim=False,
        )
        if spec.kind == "offline":
            nothing = estimate([])
            return selected, nothing, nothing
        asker = Asker(spec, tokenizer, length=settings.sample.length)
        requests = 0

        def sizes() -> Iterator[tuple[int, int]]:
            nonlocal requests
            for document in documents:
                for shown in asker.shown(document):
                    requests += 1
                    request = asker.request(shown)
                    yield request.estimate_prompt_tokens(), request.max_tokens

        asking = estimate(sizes(), price=price, limits=limits)
        check = asker.closed_book(Item("word " * 25, "word " * spec.max_answer_words, ()))
        size = (check.estimate_prompt_tokens(), check.max_tokens)
        questions = requests * (len(spec.fixed_questions) or spec.questions) if settings.leak_check else 0
        checks = estimate([size] * questions, price=price, limits=limits)
        return selected, asking, checks
