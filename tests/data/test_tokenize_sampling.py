"""Sampling while reading: enough of every source, read no further, the same sample whoever reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import ConfigError
from longspan.data.plans.mixture import plan_mixture
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.store import TokenStore
from longspan.data.store.lengths import LengthTable
from longspan.data.tokenize import CorpusJob, sampling, tokenize_corpus, units
from longspan.data.tokenize.sampling import SourceCounts, budgets, next_wave
from longspan.data.tokenizer import Tokenizer

Write = Callable[..., Path]


@pytest.fixture
def corpus(texts: list[str], write_jsonl: Write) -> Path:
    """1200 documents: short ones of "web" and "wiki", and long ones of "book"."""
    web = [{"text": f"{number} {texts[number % 50][:60]}", "source": "web"} for number in range(800)]
    wiki = [{"text": f"{number} {texts[number % 50][:90]}", "source": "wiki"} for number in range(300)]
    book = [{"text": f"{number} " + " ".join(texts[:3]), "source": "book"} for number in range(100)]
    mixed = [each for number in range(100) for each in (*web[number::100], *wiki[number::100], book[number])]
    return write_jsonl("corpus.jsonl", *mixed)


SPEC = MixtureConfig(mode="per_source", tokens=6000, keep_short=0.2, threshold=100)


def sample(corpus: Path, tokenizer: Tokenizer, out: Path, spec: MixtureConfig, **options: Any) -> TokenStore:
    return tokenize_corpus([corpus], tokenizer, out, source_field="source", mix=spec, **options)


def test_sample_fills_the_budgets_and_stops(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample that lacks a source, or reads the whole corpus. Who makes it: test_tokenize_executors."""
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    monkeypatch.setattr(sampling, "FIRST_WAVE", 4)
    store = sample(corpus, tokenizer, tmp_path / "one", SPEC)
    found = store.manifest.counts["sampling"]
    total = CorpusJob([corpus], tokenizer, tmp_path / "none").num_units
    read = sum(source["documents_read"] for source in found["sources"].values())
    assert total > 30 and 300 < read < 1100
    assert all(source["tokens"] >= source["wanted"] for source in found["sources"].values())
    assert sum(source["wanted"] for source in found["sources"].values()) in range(6000, 6004)
    short = store.lengths.tokens < 100
    assert 0.1 < int(short.sum()) / (read * 0.9) < 0.3, "the coin keeps a fifth of the short documents"
    mixture = MixtureConfig.from_dict(found["mixture"])
    plan = plan_mixture(mixture, store.lengths, seed=found["seed"])
    whole = tokenize_corpus([corpus], tokenizer, tmp_path / "whole", source_field="source").lengths
    for name, row in plan.report.sources.items():
        tokens = whole.tokens[whole.source == whole.source_names.index(name)]
        assert abs(row.tokens / 6000 - tokens.sum() / whole.total_tokens) < 0.05, name
        assert row.shortfall == 0


def test_coin_is_that_of_the_mixture(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against short documents being dropped twice, once while reading and once by the mixture."""
    spec = MixtureConfig(mode="global", tokens=10**9, keep_short=0.2, threshold=100)
    store = sample(corpus, tokenizer, tmp_path / "sample", spec, seed=5)
    whole = tokenize_corpus([corpus], tokenizer, tmp_path / "whole", source_field="source").lengths
    assert (
        kept(spec, store.lengths, seed=5) == kept(spec, whole, seed=5) == sorted(store.lengths.key.tolist())
    )
    assert store.manifest.counts["sampling"]["sources"]["book"]["documents"] == 100


def kept(spec: MixtureConfig, lengths: LengthTable, *, seed: int) -> list[int]:
    return sorted(lengths.key[plan_mixture(spec, lengths, seed).documents].tolist())


def test_unwanted_sources_are_not_tokenized(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against a source outside of the mixture filling the store."""
    spec = MixtureConfig(mode="proportions", tokens=2000, weights={"book": 3, "wiki": 1})
    store = sample(corpus, tokenizer, tmp_path / "out", spec)
    assert set(store.lengths.source_names) == {"book", "wiki"}
    found = store.manifest.counts["sampling"]["sources"]
    assert (found["book"]["wanted"], found["wiki"]["wanted"], found["web"]["wanted"]) == (1500, 500, None)
    with pytest.raises(ConfigError, match="number of tokens"):
        sample(corpus, tokenizer, tmp_path / "x", MixtureConfig())


def test_budgets_and_waves() -> None:
    """Guards against a source that has nothing yet being taken for full, and against waves without an end."""
    seen = {"a": SourceCounts(10, 3000, 5, 900), "b": SourceCounts(10, 1000, 0, 0)}
    state = budgets(MixtureConfig(mode="per_source", tokens=1000), seen)
    assert state.wanted == {"a": 750, "b": 250} and state.full == {"a"} and state.filled == 0
    total = budgets(MixtureConfig(mode="global", tokens=800), seen)
    assert total.filled > 1
    assert next_wave(16, 0.0) == 16 and next_wave(64, 0.0) == 64
    assert next_wave(64, 0.8) == 16 and next_wave(64, 0.1) == 64
    assert np.isclose(
        budgets(MixtureConfig(mode="upsample", tokens=1000, weights={"b": 1}), seen).wanted["b"], 572
    )
