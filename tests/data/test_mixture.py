"""Mixture plans: who is chosen, how often, in which order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ConfigError, DataError
from longspan.data.plans.mixture import MixturePlan, plan_mixture
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.store.lengths import LengthTable
from tests.data.made_stores import make_table

QUICK = settings(max_examples=40, deadline=None)


def random_table(count: int = 3000, seed: int = 0) -> LengthTable:
    """Three sources with shares near 60, 30 and 10 percent; books are long, the others mixed."""
    generator = np.random.default_rng(seed)
    names = generator.choice(["web", "code", "books"], count, p=[0.7, 0.28, 0.02])
    tokens = generator.lognormal(6.5, 1.4, count).astype(int) + 1
    tokens[names == "books"] += 5000
    return make_table([(str(name), int(n)) for name, n in zip(names, tokens)])


documents_strategy = st.lists(
    st.tuples(st.sampled_from(["web", "code", "books"]), st.integers(0, 60)), min_size=1, max_size=60
)


def test_none_takes_every_document_once() -> None:
    """Mode none must not lose a document to a coin; an empty document has nothing to train on."""
    table = make_table([("web", 5), ("web", 0), ("code", 7)])
    plan = plan_mixture(MixtureConfig(mode="none"), table, 1)
    assert sorted(plan.documents.tolist()) == [0, 2]
    assert plan.documents.dtype == np.uint32
    assert (plan.report.tokens, plan.report.documents, plan.report.requested) == (12, 2, None)


def test_the_order_is_shuffled_and_follows_the_seed() -> None:
    """Store order would put one file after another into training."""
    table = make_table([("web", 5)] * 50)
    orders = [plan_mixture(MixtureConfig(mode="none"), table, seed).documents.tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_a_budget_stops_at_the_document_that_reaches_it() -> None:
    """With 10-token documents a budget of 25 takes three, and reports 5 tokens too many."""
    plan = plan_mixture(MixtureConfig(mode="none", tokens=25), make_table([("web", 10)] * 8), 1)
    assert (len(plan.documents), plan.report.overshoot, plan.report.shortfall) == (3, 5, 0)
    exact = plan_mixture(MixtureConfig(mode="none", tokens=30), make_table([("web", 10)] * 8), 1)
    assert (len(exact.documents), exact.report.overshoot) == (3, 0)


def test_long_documents_always_stay_and_short_ones_by_their_coin() -> None:
    """keep_short is a probability for documents below the threshold; the threshold itself is long."""
    table = make_table([("web", 4095)] * 4000 + [("web", 4096)] * 100)
    report = plan_mixture(MixtureConfig(mode="global", keep_short=0.1), table, 3).report
    web = report.sources["web"]
    assert web.kept_long == 100
    assert 300 < web.kept_short < 500  # 400 expected, standard deviation 19
    assert plan_mixture(MixtureConfig(mode="global", keep_short=0), table, 3).report.documents == 100
    assert plan_mixture(MixtureConfig(mode="global", keep_short=1), table, 3).report.documents == 4100


def test_per_source_keeps_the_domain_mixture() -> None:
    """Upsampling long documents globally would turn a web corpus into a book corpus."""
    table = random_table()
    spec = MixtureConfig(mode="per_source", tokens=table.total_tokens // 5, keep_short=0.1, threshold=2048)
    report = plan_mixture(spec, table, 7).report
    assert report.shortfall == 0
    for name, source in report.sources.items():
        longest = int(table.tokens[table.source == table.source_names.index(name)].max())
        assert source.requested is not None
        assert 0 <= source.tokens - source.requested < longest
        assert abs(source.requested - source.share_before * spec.tokens) <= 1
    kept = plan_mixture(MixtureConfig(mode="global", tokens=spec.tokens, threshold=2048), table, 7).report
    drift = {name: abs(source.share_after - source.share_before) for name, source in kept.sources.items()}
    assert max(drift.values()) > 0.02  # guards against the comparison passing vacuously


def test_without_a_budget_the_scarcest_source_sets_the_size() -> None:
    """Half of each: 20 tokens of code allow 20 of web, not all 80."""
    table = make_table([("web", 10)] * 8 + [("code", 10)] * 2)
    spec = MixtureConfig(mode="proportions", weights={"web": 1, "code": 1})
    report = plan_mixture(spec, table, 1).report
    assert {name: source.tokens for name, source in report.sources.items()} == {"web": 20, "code": 20}
    doubled = MixtureConfig(mode="proportions", weights={"web": 1, "code": 1}, max_repeat=2)
    report = plan_mixture(doubled, table, 1).report
    assert {name: source.tokens for name, source in report.sources.items()} == {"web": 40, "code": 40}
    assert report.sources["code"].repeats == 2 and report.sources["web"].repeats == 0


def test_a_shortfall_is_reported_and_repeats_fill_it_up_to_the_cap() -> None:
    """A stream that silently ends early would give another mixture than the one asked for."""
    table = make_table([("web", 10)] * 20 + [("code", 10)] * 2)
    asked = {"mode": "proportions", "weights": {"web": 0.5, "code": 0.5}, "tokens": 100}
    once = plan_mixture(MixtureConfig.from_dict(asked), table, 1).report
    assert (once.sources["code"].requested, once.sources["code"].tokens) == (50, 20)
    assert once.shortfall == once.sources["code"].shortfall == 30
    twice = plan_mixture(MixtureConfig.from_dict(asked | {"max_repeat": 2}), table, 1)
    assert (twice.report.sources["code"].tokens, twice.report.shortfall) == (40, 10)
    plenty = plan_mixture(MixtureConfig.from_dict(asked | {"max_repeat": 9}), table, 1)
    code = plenty.report.sources["code"]
    assert (code.tokens, code.repeats, code.shortfall) == (50, 3, 0)
    times = np.bincount(plenty.documents, minlength=22)[20:]
    assert sorted(times.tolist()) == [2, 3]


def test_upsample_replaces_the_weight_of_named_sources_only() -> None:
    """web 60, code 30, books 10 percent with books 1.0: 0.6 + 0.3 + 1.0 = 1.9."""
    table = make_table([("web", 10)] * 60 + [("code", 10)] * 30 + [("books", 10)] * 10)
    spec = MixtureConfig(mode="upsample", weights={"books": 1.0}, tokens=190)
    requested = {name: row.requested for name, row in plan_mixture(spec, table, 1).report.sources.items()}
    assert requested == {"web": 60, "code": 30, "books": 100}


def test_budgets_sum_to_the_whole() -> None:
    """Rounding each of three thirds down would lose a token of 100."""
    table = make_table([(name, 1) for name in ("a", "b", "c") for _ in range(100)])
    plan = plan_mixture(
        MixtureConfig(mode="proportions", weights={"a": 1, "b": 1, "c": 1}, tokens=100), table, 1
    )
    assert sorted(row.requested or 0 for row in plan.report.sources.values()) == [33, 33, 34]
    assert plan.report.requested == plan.report.tokens == 100


def test_sources_can_be_chosen() -> None:
    """Left-out sources count neither as available nor as original mixture."""
    table = make_table([("web", 10)] * 6 + [("code", 10)] * 4)
    report = plan_mixture(MixtureConfig(mode="none", sources=("code",)), table, 1).report
    assert list(report.sources) == ["code"]
    assert (report.tokens, report.sources["code"].share_before) == (40, 1.0)


def test_every_source_is_spread_over_the_whole_run() -> None:
    """Choosing and ordering by one hash would put a source of which a tenth is taken into the first tenth."""
    table = make_table([("web", 10)] * 3000 + [("code", 10)] * 300)
    weights = {"web": 0.5, "code": 0.5}  # code is repeated twice, half of web is taken once
    plan = plan_mixture(
        MixtureConfig(mode="proportions", weights=weights, tokens=15000, max_repeat=3), table, 1
    )
    is_code = plan.documents >= 3000
    assert [round(float(quarter.mean()), 1) for quarter in np.array_split(is_code, 4)] == [0.5] * 4
    code = plan.documents[is_code]
    # 750 code documents: a first pass of 300, a second of 300, half a third; passes do not mix.
    assert [len(set(part.tolist())) for part in (code[:300], code[300:600], code[600:])] == [300, 300, 150]


@QUICK
@given(documents=documents_strategy, seed=st.integers(0, 2**32), data=st.data())
def test_the_plan_depends_on_keys_not_on_store_order(
    documents: list[tuple[str, int]], seed: int, data: st.DataObject
) -> None:
    """Another file listing order or worker count must not change what is trained on, nor in which order."""
    order = data.draw(st.permutations(range(len(documents))))
    table = make_table(documents)
    moved = make_table([documents[i] for i in order], keys=list(order))
    budget = max(1, table.total_tokens // 2)
    for spec in (
        MixtureConfig(mode="global", keep_short=0.5, threshold=30),
        MixtureConfig(mode="per_source", keep_short=0.5, threshold=30, tokens=budget, max_repeat=3),
    ):
        try:
            expected = plan_mixture(spec, table, seed)
        except DataError:
            with pytest.raises(DataError):
                plan_mixture(spec, moved, seed)
            continue
        found = plan_mixture(spec, moved, seed)
        assert table.key[expected.documents].tolist() == moved.key[found.documents].tolist()
        assert found.report.model_dump() == expected.report.model_dump()


@QUICK
@given(
    documents=documents_strategy,
    tokens=st.integers(1, 3000),
    max_repeat=st.integers(1, 4),
    keep=st.sampled_from([0.0, 0.3, 1.0]),
    mode=st.sampled_from(["global", "per_source", "upsample", "proportions"]),
)
def test_budgets_are_met_within_one_document(
    documents: list[tuple[str, int]], tokens: int, max_repeat: int, keep: float, mode: str
) -> None:
    """Overshoot below one document, a shortfall only when every pass is used up, repeats capped."""
    table = make_table(documents)
    settings = {"mode": mode, "tokens": tokens, "max_repeat": max_repeat, "keep_short": keep, "threshold": 20}
    if mode in ("upsample", "proportions"):
        settings["weights"] = {documents[0][0]: 2.0}
    try:
        plan = plan_mixture(MixtureConfig.from_dict(settings), table, 5)
    except DataError:
        return
    times = np.bincount(plan.documents, minlength=len(table))
    assert times.max(initial=0) <= max_repeat
    assert plan.report.tokens == int(table.tokens[plan.documents].sum())
    assert plan.report.documents == len(plan.documents) == int(times.sum())
    assert plan.report.repeats == int(np.maximum(times - 1, 0).sum())
    for name, row in plan.report.sources.items():
        own = table.source == table.source_names.index(name)
        assert row.tokens == int(table.tokens[plan.documents[own[plan.documents]]].sum())
        if row.requested is None:
            continue
        longest = int(table.tokens[own].max(initial=0))
        assert row.tokens - row.requested == row.overshoot - row.shortfall
        assert row.overshoot < max(longest, 1)
        if row.shortfall:
            assert set(times[own]) <= {0, max_repeat}
    if mode == "global":
        assert plan.report.overshoot < int(table.tokens.max())


def test_a_saved_plan_comes_back(tmp_path: Path) -> None:
    """A plan must be the same plan after a round trip, or a resumed job would refuse its own data."""
    plan = plan_mixture(MixtureConfig(tokens=2000, threshold=1000, max_repeat=4), random_table(100), 3)
    plan.save(tmp_path / "mix", stores=["stores/web"])
    loaded = MixturePlan.load(tmp_path / "mix")
    assert loaded.documents.tolist() == plan.documents.tolist()
    assert (loaded.report, loaded.spec, loaded.seed) == (plan.report, plan.spec, plan.seed)
    assert loaded.fingerprint == plan.fingerprint
    assert loaded.stores == ("stores/web",)
    again = MixturePlan.load(tmp_path / "mix")
    again.save(tmp_path / "copy")
    assert MixturePlan.load(tmp_path / "copy").stores == ("stores/web",)


def test_the_fingerprint_changes_with_seed_and_settings() -> None:
    """Resuming with other data must be noticed."""
    table = random_table(100)
    spec = MixtureConfig(mode="none")
    prints = {
        plan_mixture(spec, table, 1).fingerprint,
        plan_mixture(spec, table, 2).fingerprint,
        plan_mixture(MixtureConfig(mode="none", tokens=500), table, 1).fingerprint,
        plan_mixture(spec, random_table(100, seed=1), 1).fingerprint,
    }
    assert len(prints) == 4


def test_a_changed_plan_is_refused(tmp_path: Path) -> None:
    """Documents of another plan under this plan's head would be trained on unnoticed."""
    plan = plan_mixture(MixtureConfig(mode="none"), random_table(20), 3)
    plan.save(tmp_path / "mix")
    np.save(tmp_path / "mix" / "documents.npy", plan.documents[::-1].copy())
    with pytest.raises(DataError, match="was changed"):
        MixturePlan.load(tmp_path / "mix")


@pytest.mark.parametrize("missing", ["spec", "report", "seed", "lengths", "stores"])
def test_a_damaged_head_is_refused(tmp_path: Path, missing: str) -> None:
    """A head without a part is bad data, not a KeyError."""
    plan_mixture(MixtureConfig(mode="none"), random_table(20), 3).save(tmp_path / "mix")
    head = json.loads((tmp_path / "mix" / "head.json").read_text())
    del head["head"][missing]
    (tmp_path / "mix" / "head.json").write_text(json.dumps(head))
    with pytest.raises(DataError, match="damaged"):
        MixturePlan.load(tmp_path / "mix")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "none", "keep_short": 0.5}, "keep_short has no effect"),
        ({"mode": "global", "weights": {"web": 1}}, "weights have no effect"),
        ({"mode": "proportions"}, "needs weights"),
        ({"mode": "proportions", "weights": {"web": -1, "code": 2}}, "not negative"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": "5 potatoes"}, "token budget"),
        ({"keep_short": 1.5}, "keep_short"),
        ({"max_repeat": 0}, "max_repeat"),
        ({"treshold": 5}, "did you mean 'threshold'"),
    ],
)
def test_wrong_settings_are_explained(values: dict[str, object], message: str) -> None:
    """A setting that has no effect or no meaning is refused before any work is done."""
    with pytest.raises(ConfigError, match=message):
        MixtureConfig.from_dict(values)


def test_settings_take_units() -> None:
    """Budgets are decimal, lengths are binary."""
    spec = MixtureConfig.from_dict({"tokens": "5B", "threshold": "4k"})
    assert (spec.tokens, spec.threshold) == (5_000_000_000, 4096)
    with pytest.raises(pydantic.ValidationError):
        MixtureConfig.model_validate({"tokens": [5]})


def test_unknown_sources_are_named() -> None:
    """A misspelt source must not silently get no tokens."""
    table = make_table([("web", 10), ("code", 10)])
    with pytest.raises(ConfigError, match="wbe"):
        plan_mixture(MixtureConfig(mode="proportions", weights={"wbe": 1}), table, 1)
    with pytest.raises(ConfigError, match="wbe"):
        plan_mixture(MixtureConfig(mode="none", sources=("wbe",)), table, 1)
    with pytest.raises(ConfigError, match="leaves out"):
        plan_mixture(MixtureConfig(mode="proportions", weights={"web": 1}, sources=("code",)), table, 1)


def test_nothing_left_is_an_error() -> None:
    """An empty plan would end in a division by zero far from its cause."""
    table = make_table([("web", 10), ("code", 5000)])
    with pytest.raises(DataError, match="no document is left"):
        plan_mixture(MixtureConfig(mode="global", keep_short=0, sources=("web",)), table, 1)
    with pytest.raises(DataError, match=r"found: web"):
        plan_mixture(MixtureConfig(mode="per_source", keep_short=0), table, 1)
