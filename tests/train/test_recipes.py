"""The shipped recipes: published numbers, resolved without their data, and run at tiny scale to an exported model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.core.errors import ArgumentError, ConfigError, DataError, UserError
from longspan.core.records import read_jsonl
from longspan.models.export import export_model
from longspan.models.hf import build_model, load_model, rope_of, save_model
from longspan.train.config import ModelConfig, ParallelConfig, TrainConfig
from longspan.train.loop_config import InitConfig
from longspan.train.recipes import load_recipe, scale_tiny, shipped_recipes
from longspan.train.resolve import resolve
from longspan.train.stage_model import rope_at
from longspan.train.streams import plan_stage
from longspan.train.tiny_inputs import tiny_inputs
from longspan.train.trainer import train
from tests.train.conftest import recipe
from tests.train.recipes_today import TODAY

# context, steps, tokens a step, peak rate, theta and factor of each stage, as published; fu: 5B tokens in steps of 4M.
PUBLISHED: dict[str, list[tuple[int, int | None, int, float, float | None, float | None]]] = {
    "fu-2024-80k": [(81920, 1272, 48 * 81920, 2e-5, 1e4, 10)],
    "fu-2024-13b-64k": [(65536, 1362, 56 * 65536, 2e-5, 1e4, 10)],
    "prolong-64k": [(65536, 5000, 64 * 65536, 1e-5, 8e6, None)],
    "prolong-512k": [
        (65536, 5000, 64 * 65536, 1e-5, 8e6, None),
        (524288, 2500, 16 * 524288, 5e-6, 128e6, None),
    ],
    "prolong-sft": [(65536, 250, 64 * 65536, 2e-5, None, None)],
    "qlora-80k": [(81920, None, 8 * 81920, 5e-5, 200e6, None)],
    # Ours: its numbers are those of its comments.
    "agent-sft-128k": [(131072, None, 8 * 131072, 1e-4, 5e6, None)],
    "synth-80k": [(81920, None, 8 * 81920, 5e-5, 200e6, None)],
}
# The domains of train_512K.sh below datasets/long-context-524288, as they are called since 2024-12-11.
DOMAINS_512K = [
    "thestackv1_concat_by_repo-524288@0.15",
    "thestackv1_concat_by_repo-65536@0.15",
    "book-524288@0.05",
    "book-65536@0.25",
    "fineweb-edu@0.1",
    "fineweb-2023-50@0.1",
    "stackexchange@0.04",
    "dolmawiki@0.04",
    "tuluv2@0.03",
    "arxiv@0.03",
    "openwebmath@0.03",
    "textbooks@0.03",
]
PUBLISHED["easycontext-1m"] = PUBLISHED["easycontext-13b-1m"] = [
    (32768, 1000, 32 * 32768, 2e-5, 1e6, None),
    (65536, 1000, 16 * 65536, 2e-5, 5e6, None),
    (256000, 500, 4 * 256000, 2e-5, 10e6, None),
    (256000, 500, 4 * 256000, 2e-5, 25e6, None),
    (256000, 150, 4 * 256000, 2e-5, 50e6, None),
    (512000, 300, 2 * 512000, 2e-5, 100e6, None),
    (512000, 90, 2 * 512000, 1e-5, 250e6, None),
    (1048576, 0, 1048576, 1e-5, 1e9, None),
]
PUBLISHED["easycontext-danube2-256k"] = [
    (16000, 400, 64 * 16000, 2e-5, 3e4, None),
    (32000, 400, 32 * 32000, 2e-5, 1e5, None),
    (32000, 400, 32 * 32000, 2e-5, 3e5, None),
    (64000, 400, 16 * 64000, 2e-5, 1e6, None),
    (64000, 400, 16 * 64000, 2e-5, 2.5e6, None),
    (64000, 400, 16 * 64000, 2e-5, 5e6, None),
    (128000, 300, 8 * 128000, 2e-5, 1e7, None),
    (128000, 200, 8 * 128000, 2e-5, 3e7, None),
    (256000, 200, 4 * 256000, 2e-5, 1e8, None),
]


def test_every_shipped_recipe_is_checked_here() -> None:
    """A recipe that is added without its numbers would never be looked at."""
    assert shipped_recipes() == sorted({*PUBLISHED, *TODAY})


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_numbers_are_those_that_were_published(name: str) -> None:
    """A slip in a batch size trains something else under a known name."""
    config = load_recipe(name).config
    found = [
        (
            stage.context_length,
            None if stage.epochs else stage.num_steps,
            stage.rows_per_step * stage.context_length,
            stage.lr,
            (stage.rope or {}).get("rope_theta"),
            (stage.rope or {}).get("factor"),
        )
        for stage in config.stages
    ]
    assert found == PUBLISHED[name]
    assert TrainConfig.from_dict(config.to_dict()) == config, "the settings that a run writes are read again"


def test_prolong_512k_reads_the_folders_that_its_script_names() -> None:
    """Four of them were renamed after the release, and a stream under the old name is not found."""
    streams = load_recipe("prolong-512k").config.stages[1].streams
    named = [f"{stream.rows}@{stream.weight}" for stream in streams.values()]
    assert named == [f"long-context-524288/{domain}" for domain in DOMAINS_512K]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_dry_run_needs_neither_the_model_nor_the_data(name: str, tmp_path: Path) -> None:
    """Who plans a run has not downloaded a terabyte yet; tokens, memory and time must be there all the same."""
    config = load_recipe(name).config
    resolved = resolve(config, name, data_root=tmp_path, gpu="h100")
    assert any("not on this machine" in note for note in resolved.notes)
    world = resolved.processes
    assert world == (16 if "13b-1m" in name else 8) and f"{name}" in resolved.launch
    for stage, settings in zip(resolved.stages, config.stages):
        assert set(settings.streams) <= {*stage.tokens_by_source, "slimpajama"}
        if settings.steps == 0:
            continue
        assert stage.memory is not None and 4e9 < sum(stage.memory.values()) < 141e9
        assert stage.step_seconds is not None and stage.step_seconds > 1
        if stage.tokens is not None:
            counted = [tokens for tokens in stage.tokens_by_source.values() if tokens is not None]
            assert sum(counted) == pytest.approx(stage.tokens, rel=1e-6)
            assert stage.seconds == pytest.approx(stage.step_seconds * (stage.steps or 0))
    assert json.dumps(resolved.to_dict())


def test_a_dry_run_refuses_rows_that_the_processes_cannot_share(data_root: Path) -> None:
    """It said how to start what every process would refuse."""
    config = small(data_root).model_copy(update={"parallel": ParallelConfig(dp_shard=3)})
    with pytest.raises(ConfigError, match="rows of a step do not divide"):
        resolve(config, "recipe.yaml", data_root=data_root)


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"cp_ulysses": 3}, "ulysses degree 3(.|\n)*degrees that divide 4"),
        ({"cp_ring": 2, "schedule": "ulysses"}, "no use for a ring degree"),
        ({"cp_ring": 2, "schedule": "striped", "layout": "zigzag"}, "does not work with this layout"),
        ({"tp": 2}, "raise dp_shard"),
    ],
)
def test_a_dry_run_refuses_degrees_that_training_would(
    data_root: Path, parallel: dict[str, Any], words: str
) -> None:
    """It said how to start what every process would refuse, heads that do not divide among others."""
    config = small(data_root).model_copy(update={"parallel": ParallelConfig(**parallel)})
    with pytest.raises(ArgumentError, match=words):
        resolve(config, "recipe.yaml", data_root=data_root)


def test_a_dry_run_looks_at_a_checkpoint_that_is_there_without_the_data(
    data_root: Path, tmp_path: Path
) -> None:
    """With data still to be fetched the checkpoint to begin with was looked at when the first stage started."""
    begun = {"init_from": InitConfig(path="before")}
    config = small(data_root, context_length=16).model_copy(update=begun)
    assert any("init_from" in note for note in resolve(config, "r", data_root=tmp_path).notes)
    (tmp_path / "before").mkdir()
    with pytest.raises(DataError, match="is not a checkpoint"):
        resolve(config, "r", data_root=tmp_path)


def test_a_misspelt_name_gets_the_nearest_and_the_list() -> None:
    """Only the file system's word for a missing file would not help."""
    with pytest.raises(ConfigError, match=r"prolong-sft, qlora-80k(.|\n)*did you mean 'prolong-512k'"):
        load_recipe("prolong512k")
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe("nowhere.yaml")


def test_tiny_keeps_the_structure() -> None:
    """A tiny variant that drops a stage, a carry or a RoPE shows nothing about the recipe."""
    for name in shipped_recipes():
        full = load_recipe(name).config
        tiny = scale_tiny(full)
        for before, after in zip(full.stages, tiny.stages, strict=True):
            for kept in (
                "name",
                "lr",
                "objective",
                "loss_average",
                "optimizer_state",
                "shares",
            ):
                assert getattr(after, kept) == getattr(before, kept), (name, kept)
            # A factor does not reach where rows are longer than their share.
            lengthened = after.reach > before.reach // 1024 and "factor" in (before.rope or {})
            assert after.rope_falls_short == (before.rope_falls_short or lengthened)
            assert lengthened == (name == "smollm2-8k" and before.pose is not None)
            shortest = {"agent-sft-128k": 2048, "smollm2-8k": 128}.get(name, 32)
            assert after.context_length == max(shortest, before.context_length // 1024)
            wanted = before.rope
            if wanted is not None and "original_max_position_embeddings" in wanted:
                original = wanted["original_max_position_embeddings"] // 1024
                wanted = {**wanted, "original_max_position_embeddings": original}
            assert after.rope == wanted
            assert after.rows_per_step <= 4 and list(after.streams) == list(before.streams)
            for stream, small in zip(before.streams.values(), after.streams.values()):
                assert (small.pack.strategy, small.pack.specials, small.weight) == (
                    stream.pack.strategy, stream.pack.specials, stream.weight
                )  # fmt: skip
                assert (small.mixture.mode, small.mixture.weights) == (
                    stream.mixture.mode, stream.mixture.weights
                )  # fmt: skip
        assert (tiny.lora is None) == (full.lora is None)
        if full.lora is not None and tiny.lora is not None:
            assert tiny.lora.alpha / tiny.lora.rank == full.lora.alpha / full.lora.rank
            assert (tiny.lora.target_modules, tiny.lora.quantize) == (
                full.lora.target_modules,
                full.lora.quantize,
            )


# The others with the slow tests.
FAST = ("prolong-sft", "gemma3-1b")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in shipped_recipes()],
)
def test_tiny_runs_to_a_checkpoint_and_an_exported_model(name: str, tmp_path: Path) -> None:
    """The recipe's own stages, mixtures, masks, carry and adapters have to run, not only to parse."""
    full = load_recipe(name).config
    tiny = scale_tiny(full)
    tiny_inputs(full, tiny, tmp_path / "inputs")
    result = train(tiny, tmp_path / "run", data_root=tmp_path / "inputs")
    records = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert all(record["loss"] is not None and 0 < record["loss"] < 8 for record in records)
    assert {record["stage"] for record in records} == {
        stage.name for stage in tiny.stages if stage.steps != 0
    }
    last = tiny.stages[-1]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    trained = load_model(result.models[last.name])
    export_model(trained, tmp_path / "exported", tokenizer=tmp_path / "inputs" / "tokenizer")
    model = load_model(tmp_path / "exported")
    rope = rope_at(tiny, last)
    if rope is not None:
        found = rope_of(model.config)
        assert found is not None
        assert {name: found[name] for name in rope} == rope
    assert model.config.max_position_embeddings >= last.context_length
    logits = model(torch.arange(32)[None]).logits
    assert logits.isfinite().all() and len(result.models) == len(tiny.stages)


def test_inputs_are_made_once(tmp_path: Path) -> None:
    """A second start that made its data anew would refuse to go on with the first run."""
    full = load_recipe("prolong-sft").config
    tiny = scale_tiny(full)
    tiny_inputs(full, tiny, tmp_path / "inputs")
    before = (tmp_path / "inputs" / "inputs.json").stat().st_mtime_ns
    tiny_inputs(full, tiny, tmp_path / "inputs")
    assert (tmp_path / "inputs" / "inputs.json").stat().st_mtime_ns == before


def small(data_root: Path, **stage: Any) -> TrainConfig:
    """A recipe of one stage on the store of the tests, with a model from scratch."""
    values = recipe()
    first = {**values["stages"][0], "streams": {"text": {"store": "plain"}}, **stage}
    return TrainConfig.from_dict({**values, "stages": [{k: v for k, v in first.items() if v is not ...}]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "context_length": 64,
             "batch_tokens": 128, "micro_batch_tokens": None},
            r"factor of RoPE type linear does not match.*factor 2 x 16.*at least 4",
        ),
        (
            {"rope": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                      "original_max_position_embeddings": 4096},
             "context_length": 64, "batch_tokens": 128, "micro_batch_tokens": None},
            "original_max_position_embeddings is not the context of the model",
        ),
        ({"objective": "sft"}, r"stream 'text' has no masks.*--messages-field"),
        ({"tokens": "2M"}, r"longer than its data.*rows in one epoch"),
        ({"tokens": ..., "steps": 4, "epochs": 1}, r"tokens, steps or epochs long: set one"),
        ({"tokens": ...}, r"tokens, steps or epochs long: set one"),
        ({"contxt_length": 3}, "did you mean 'context_length'"),
        ({"streams": {"text": {"records": ["a.jsonl[x]"]}}}, r"sampled by a number in brackets"),
        ({"streams": {"text": {"records": ["nowhere.jsonl"]}}}, r"nowhere\.jsonl"),
        ({"pose": {"target_length": 8}}, "is not beyond the rows"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_message_before_any_work(
    data_root: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Each of these trains the wrong thing for days where it is only a warning, or fails after hours."""
    with pytest.raises(UserError) as error:
        config = small(data_root, **changes).model_copy(update={"tokenizer": "tokenizer"})
        train(config, tmp_path / "run", data_root=data_root)
    assert re.search(message, " ".join(str(error.value).split())), error.value
    assert not (tmp_path / "run").exists()


def test_a_factor_that_falls_short_is_trained_when_it_is_said(data_root: Path, tmp_path: Path) -> None:
    """Published models were made so; the check must not make them impossible."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    config = small(
        data_root,
        rope=rope,
        rope_falls_short=True,
        context_length=64,
        batch_tokens=128,
        micro_batch_tokens=None,
    )
    result = train(config, tmp_path / "run", data_root=data_root)
    assert load_model(result.models["short"]).config.rope_parameters["factor"] == 2.0


def test_steps_and_epochs_and_a_stage_that_trains_nothing(data_root: Path, tmp_path: Path) -> None:
    """Epochs follow from the data; a stage of 0 steps only changes the RoPE of the model, weights untouched."""
    config = small(data_root, tokens=..., max_epochs=..., epochs=0.5)
    rope_only = {
        "name": "theta", "context_length": 64, "steps": 0, "batch_tokens": 64, "lr": 1e-3,
        "rope": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    config = TrainConfig.from_dict({**config.to_dict(), "stages": [config.to_dict()["stages"][0], rope_only]})
    result = train(config, tmp_path / "run", data_root=data_root)
    written = TrainConfig.from_yaml(tmp_path / "run" / "config.yaml")
    rows = plan_stage(written.stages[0], data_root=data_root, seed=3).sources["text"].num_rows
    assert written.stages[0].steps == result.steps == rows // 2 // 8
    before, after = (load_model(result.models[name]) for name in ("short", "theta"))
    assert after.config.rope_parameters["rope_theta"] == 1e6 and after.config.max_position_embeddings == 64
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    # Started again, it is found complete.
    assert train(config, tmp_path / "run", data_root=data_root).steps == result.steps


def test_fields_of_the_model_can_be_set(data_root: Path, tmp_path: Path) -> None:
    """transformers takes any field name in silence, so a misspelt one would change nothing."""
    config = small(data_root)
    assert config.model.hf_config is not None
    save_model(build_model(config.model.hf_config, seed=1), tmp_path / "base")
    model = {"path": str(tmp_path / "base"), "config_overrides": {"rms_norm_eps": 1e-3}}
    config = TrainConfig.from_dict({**config.to_dict(), "model": model})
    result = train(config, tmp_path / "run", data_root=data_root)
    assert load_model(result.models["short"]).config.rms_norm_eps == 1e-3
    wrong = {**model, "config_overrides": {"rms_norm_epsilon": 1e-3}}
    with pytest.raises(ConfigError, match="did you mean 'rms_norm_eps'"):
        train(
            TrainConfig.from_dict({**config.to_dict(), "model": wrong}), tmp_path / "no", data_root=data_root
        )
    with pytest.raises(ConfigError, match="follows from the stages"):
        TrainConfig.from_dict(
            {**config.to_dict(), "model": {**model, "config_overrides": {"rope_theta": 1.0}}}
        )


def test_a_model_that_would_fail_at_its_first_step_leaves_no_run_folder(
    data_root: Path, tmp_path: Path
) -> None:
    """The folder of the failed run refused the mended recipe, after a dry run that promised all was well."""
    fields = {**recipe()["model"]["hf_config"], "attention_dropout": 0.1}
    config = small(data_root, context_length=16).model_copy(update={"model": ModelConfig(hf_config=fields)})
    for missing in (False, True):
        # Also where the data are still to be fetched.
        root = tmp_path if missing else data_root
        with pytest.raises(UserError, match="attention dropout"):
            resolve(config, "recipe.yaml", data_root=root)
    with pytest.raises(UserError, match="attention dropout"):
        train(config, tmp_path / "run", data_root=data_root)
    assert not (tmp_path / "run").exists()


def test_a_condition_on_documents_is_left_out_at_tiny_scale(data_root: Path) -> None:
    """Its audit is of other documents: the tiny run of a recipe with one ended before its first step."""
    streams = {"a": {"store": "s", "mixture": {"mode": "none", "where": "near_duplicate == 0", "audit": "a"}}}
    config = small(data_root, streams=streams)
    (stream,) = scale_tiny(config).stages[0].streams.values()
    assert (stream.mixture.where, stream.mixture.audit) == (None, None)


def test_tiny_rows_are_long_enough_for_every_stage_and_made_here(tmp_path: Path) -> None:
    """One data set in stages of two lengths, named on the hub: nothing is fetched, and the longer stage has rows."""
    base = {"steps": 2, "lr": 0.1, "max_epochs": 9, "streams": {"a": {"rows": "hf://org/set"}}}
    stages = [
        {"name": f"s{length}", "context_length": length, "batch_tokens": length, **base}
        for length in (32768, 65536)
    ]
    full = TrainConfig.from_dict(recipe(stages=stages, optimizer={"name": "adamw"}))
    tiny = scale_tiny(full)
    tiny_inputs(full, tiny, tmp_path / "inputs")
    plans = [plan_stage(stage, data_root=tmp_path / "inputs", seed=0) for stage in tiny.stages]
    assert [plan.sources["a"].length for plan in plans] == [32, 64]
