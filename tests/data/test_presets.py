"""Published mixtures and ProLong's stream notation, down to the documents they choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longspan.core.errors import ArgumentError, ConfigError
from longspan.data.plans.mixture import plan_mixture
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.plans.presets import PRESETS, load_preset
from longspan.data.plans.shares import Stream, parse_stream, stream_settings
from longspan.data.store.lengths import LengthTable
from tests.data.made_stores import make_table


@pytest.mark.parametrize("name", PRESETS)
def test_shares_sum_to_one(name: str) -> None:
    """A mistyped share shows in the sum; only the upsampled mix is published unnormalised."""
    total = sum(load_preset(name).weights.values())
    expected = 2.66556465 - 1e-8 if "upsample" in name else 1.0
    assert total == pytest.approx(expected, abs=2e-3)


def test_names_of_the_data_are_found() -> None:
    """The data says RedPajamaC4, the paper says C4; a source that is not there is an error by name."""
    preset = load_preset("slimpajama-per-source")
    names = ["RedPajama" + name for name in preset.weights]
    assert preset.weights_for(names)["RedPajamaBook"] == 0.0414836
    with pytest.raises(ConfigError, match="no Book"):
        preset.weights_for(names[:-1])
    assert load_preset("prolong-64k").weights_for(
        [
            "code_repo",
            "book",
            "fineweb-edu",
            "fineweb",
            "stackexchange",
            "wiki",
            "tulu",
            "arxiv",
            "owm",
            "textbooks",
        ]
    )["owm"] == pytest.approx(0.03)
    with pytest.raises(ArgumentError, match="cepe-concat"):
        load_preset("slimpajama")


def test_no_two_sources_of_a_preset_are_one() -> None:
    """Spelling rules that fold two sources into one would lose a share."""
    for preset in PRESETS.values():
        assert preset.weights_for(list(preset.weights)) == preset.weights


def test_streams_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ProLong splits at every @ and #, so a path that has one could not be used."""
    assert parse_stream("data/book@0.3") == Stream("data/book", proportion=0.3)
    assert parse_stream("data/book#2") == Stream("data/book", repeat=2.0)
    assert parse_stream("s3://user@host/c#code") == Stream("s3://user@host/c#code")
    assert parse_stream("a@b@.5") == Stream("a@b", proportion=0.5)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store#1").mkdir()
    assert parse_stream("store#1") == Stream("store#1")
    assert parse_stream("store#1#3") == Stream("store#1", repeat=3.0)
    with pytest.raises(ArgumentError, match="above 0"):
        parse_stream("data/book@0")


def test_streams_become_a_mixture() -> None:
    """Stores are mixed, not their sources: both stores here hold the same source."""
    tables = [make_table([("web", 10)] * 20), make_table([("web", 10)] * 20, keys=range(100, 120))]
    lengths = LengthTable.concatenate(tables)

    def chosen(*streams: str, **values: object) -> list[int]:
        settings = stream_settings([parse_stream(text) for text in streams])
        plan = plan_mixture(MixtureConfig.from_dict(settings | values), lengths, 0)
        assert plan.lengths_fingerprint == lengths.fingerprint
        return np.bincount(lengths.store[plan.documents], minlength=2).tolist()

    assert chosen("a@0.25", "b@0.75", tokens=200) == [5, 15]
    assert chosen("a@1", "b@3", tokens=800, max_repeat=3) == [20, 60]
    assert chosen("a#2", "b") == [40, 20]
    assert chosen("a#2.5", "b#0.5") == [50, 10]
    assert stream_settings([Stream("a"), Stream("b")]) == {}
    with pytest.raises(ArgumentError, match="every stream has a share"):
        stream_settings([Stream("a", proportion=0.5), Stream("b")])


def test_repeat_takes_every_document_so_many_times() -> None:
    """Two uses are two of each, in different orders, not a random half twice."""
    table = make_table([("a", 7)] * 10 + [("b", 7)] * 10)
    plan = plan_mixture(MixtureConfig.from_dict({"mode": "repeat", "weights": {"a": 2}}), table, 0)
    assert np.bincount(plan.documents).tolist() == [2] * 10 + [1] * 10
    assert plan.report.sources["a"].repeats == 10
    with pytest.raises(ConfigError, match="no effect in mode repeat"):
        MixtureConfig.from_dict({"mode": "repeat", "weights": {"a": 2}, "tokens": 5})
