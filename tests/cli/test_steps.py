"""The functions of the whole way: they and the commands do the same, and both refuse the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from longspan import (
    AnswererConfig,
    ArgumentError,
    ConfigError,
    DataError,
    LongspanError,
    MixtureConfig,
    TokenStore,
    evaluate_model,
    mix_stores,
    pack_rows,
    tokenize_corpus,
    train_model,
    write_report,
)
from longspan.data.plans.mixture import MixturePlan
from longspan.data.plans.packing import PackPlan
from longspan.eval.records import read_records


def test_plans_are_those_of_the_commands(store: Path, longspan) -> None:
    """A second way to plan would choose other documents for those who write programs."""
    assert (
        tokenize_corpus("texts", "tokenizer", "again").lengths.fingerprint
        == TokenStore(store).lengths.fingerprint
    )
    assert longspan("data mix store --mode per_source --tokens 9k --seed 3 --out mixed").code == 0
    here = mix_stores(store, "here", mode="per_source", tokens="9k", seed=3)
    assert here.plan.fingerprint == MixturePlan.load("mixed").fingerprint
    assert here.plan.report.tokens == here.lengths.tokens[here.plan.documents].sum()

    split = "--strategy split --split-lengths 256,64"
    assert longspan(f"data pack mixed --length 256 {split} --out rows").code == 0
    rows = pack_rows("here", "ours", 256, strategy="split", split_lengths=(256, 64))
    assert {place.name: plan.fingerprint for place, plan in rows.items()} == {
        place.name: PackPlan.load(place).fingerprint for place in Path("rows").iterdir() if place.is_dir()
    }
    assert all(PackPlan.load(place).fingerprint == plan.fingerprint for place, plan in rows.items())


def test_shares_in_names_are_the_settings_of_a_mixture(store: Path) -> None:
    """`STORE@0.3` in a program must not be taken for a path alone, nor be outvoted without a word."""
    named = mix_stores([f"{store}#2"], "twice").plan
    assert named.report.tokens == 2 * TokenStore(store).lengths.tokens.sum()
    with pytest.raises(ArgumentError, match="mode too"):
        mix_stores([f"{store}#2"], "x", mode="none")
    with pytest.raises(ArgumentError, match="another mixture"):
        mix_stores([f"{store}#2"], "x", MixtureConfig(mode="none"))
    with pytest.raises(ArgumentError, match="leave out one"):
        mix_stores(store, "x", MixtureConfig(mode="none"), preset="prolong-64k")
    with pytest.raises(ConfigError, match=r"token.*did you mean 'tokens'"):
        mix_stores(store, "x", token=5)
    with pytest.raises(ArgumentError, match="no store is named"):
        mix_stores([], "x")
    assert not Path("x").exists()


def test_what_stands_beside_a_mixture_is_refused(store: Path, longspan) -> None:
    """All but the first input used to be left out without a word."""
    mix_stores(store, "mixture", mode="none")
    for inputs in (["mixture", "store"], ["store", "mixture"], ["mixture", "mixture"]):
        with pytest.raises(ArgumentError, match="rows are made of one mixture"):
            pack_rows(inputs, "rows", 64)
    assert "rows are made of one mixture" in longspan("data pack mixture store --length 64 --out rows").err
    assert not Path("rows").exists()


def test_a_recipe_is_trained_as_by_the_command(store: Path, longspan) -> None:
    """Settings that a program changes must be those of --set, tiny scale included."""
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    changes = {"seed": 5, "stages.0.tokens": None, "stages.0.steps": 1}
    words = "--set seed=5 --set stages.0.tokens=null --set stages.0.steps=1"
    assert longspan(f"train recipe.yaml {words} --out command").code == 0
    done = train_model(recipe, "function", settings=changes)
    assert done.steps == 1 and done.models == {"short": Path("function/stages/short")}
    command, function = (
        json.loads(Path(run, "metrics.jsonl").read_text()) for run in ("command", "function")
    )
    assert command["loss"] == function["loss"]
    assert Path("command/config.yaml").read_text() == Path("function/config.yaml").read_text()
    assert (
        train_model("recipe.yaml", "function", settings=changes).steps == 1
    )  # complete: nothing is done twice
    with pytest.raises(ConfigError, match=r"stages\.0\.step\b.*did you mean 'steps'"):
        train_model(recipe, "x", settings={"stages.0.step": 1})
    with pytest.raises(ConfigError, match="there is no recipe 'prolong-46k'"):
        train_model("prolong-46k", "x")


def test_an_evaluation_is_that_of_the_command(model: Path, longspan) -> None:
    """The records of a program go on with those of a command, and the other way round: not one is asked twice."""
    tasks = {
        "needle": ({"data": "texts", "lengths": (128, 192)}, "--data texts --lengths 128,192"),
        "passkey": ({"lengths": ("512",)}, "--lengths 512"),
    }
    for task, (settings, options) in tasks.items():
        summary = evaluate_model(model, task, "run", depths=(0, 1), samples=1, **settings)
        before = read_records(Path(summary["records"]))
        assert len(before.samples) == summary["scored"] == 2 * len(settings["lengths"])
        assert longspan(f"eval {task} --model model {options} --depths 0,1 --samples 1 --out run").code == 0
        # With their seconds: an answer that is given again takes another time.
        assert read_records(Path(summary["records"])).samples == before.samples
    first = evaluate_model({"model": str(model), "label": "a"}, "ppl", "run", data="texts", lengths=(64,))
    second = evaluate_model(
        AnswererConfig(model=str(model), label="a"), "ppl", "run", data="texts", lengths=(64,)
    )
    assert first["by_length"] == second["by_length"]
    header = read_records(Path(first["records"])).header
    assert header["settings"]["lengths"] == [64] and header["settings"]["paths"] == ["texts"]
    assert write_report("run", "report.html").results["run"]["ppl"].keys() == {"a"}


def test_what_an_evaluation_cannot_do_is_said(model: Path) -> None:
    """A task that is no function of the model must be refused before the model is opened."""
    with pytest.raises(ArgumentError, match="there is no such task"):
        evaluate_model("nowhere", "needles", "run")
    with pytest.raises(ArgumentError, match="found: 'harness'\n  allowed: needle"):
        evaluate_model("nowhere", "harness", "run")
    with pytest.raises(ArgumentError, match="these settings ask for topics"):
        evaluate_model(model, "lines", "run", counts=(4,), samples=1)
    with pytest.raises(
        ArgumentError, match=r"no settings of needle\n  found: MixtureConfig\n  allowed: NeedleConfig"
    ):
        evaluate_model(model, "needle", "run", MixtureConfig())
    with pytest.raises(ConfigError, match="settings of needle is not valid"):
        evaluate_model(model, "needle", "run", length=128)
    with pytest.raises(ArgumentError, match="servers do not say"):
        evaluate_model("openai:name", "ppl", "run", data="texts", lengths=(64,))
    with pytest.raises(LongspanError):
        evaluate_model(model, "needle", "run", data="no-such-folder", lengths=(128,))
    with pytest.raises(DataError):
        tokenize_corpus("no-such-folder", "tokenizer", "x")
    assert not Path("run").exists()
