"""The loop: accumulation, stages, and mistakes that are found before the first step."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.core.errors import ConfigError, DataError, RunError
from longspan.core.records import read_jsonl
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import train_bpe
from longspan.models.hf import build_model, load_model, save_model
from longspan.train.batch import total_weight
from longspan.train.config import TrainConfig
from longspan.train.optim import build_optimizers, set_lr
from longspan.train.run_plan import plan_run
from longspan.train.streams import plan_stage, stage_rows
from longspan.train.trained import STARTED
from longspan.train.trainer import train, train_step
from tests.train.conftest import recipe


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.from_dict(recipe(**changes))


def stages(index: int, **changes: Any) -> list[dict[str, Any]]:
    values = recipe()["stages"]
    values[index] = {**values[index], **changes}
    return values


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(out / "metrics.jsonl")]


def test_micro_batches_do_not_change_the_step(data_root: Path) -> None:
    """A mean of micro-batch means weighs a micro-batch with few labels as much as one with many."""
    settings = config()
    plan = plan_stage(settings.stages[0], data_root=data_root, seed=0)
    rows = plan.mixer.rows(0, 8)
    assert len({float(row.weights.sum()) for row in rows if row.weights is not None}) > 1, "rows weigh alike"
    results = []
    for rows_per_micro_batch in (8, 3, 1):
        assert settings.model.hf_config is not None
        model = build_model(settings.model.hf_config, seed=1)
        optimizers = build_optimizers(model, settings.optimizer)
        set_lr(optimizers, lr=0.02, adamw_lr=0.004)
        result = train_step(
            model, optimizers, rows, rows_per_micro_batch=rows_per_micro_batch, max_grad_norm=1.0
        )
        results.append((result, [parameter.detach() for parameter in model.parameters()]))
    whole = results[0]
    for result, parameters in results[1:]:
        assert result.loss == pytest.approx(whole[0].loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(whole[0].grad_norm, rel=1e-5)
        assert result.loss_by_source == pytest.approx(whole[0].loss_by_source, rel=1e-6)
        for left, right in zip(parameters, whole[1]):
            torch.testing.assert_close(left, right, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("rows_per_micro_batch", [8, 3])
def test_a_mean_over_samples_is_that_of_one_conversation_a_batch(
    data_root: Path, rows_per_micro_batch: int
) -> None:
    """The loss of a trainer whose batch is one conversation: four answer tokens weigh what a long text weighs."""
    settings = config()
    streams = {"text": {"store": "plain", "pack": {"strategy": "best_fit"}}}
    packed = config(stages=stages(1, streams=streams, batch_tokens=8 * 48)).stages[1]
    stage = packed.model_copy(update={"loss_average": "samples"})
    plan = plan_stage(stage, data_root=data_root, seed=0)
    assert settings.model.hf_config is not None
    model = build_model(settings.model.hf_config, seed=1)
    alone = []
    for row in plan_stage(packed, data_root=data_root, seed=0).mixer.rows(0, 8):
        for start, end in zip(row.cu_seqlens, row.cu_seqlens[1:]):
            ids, weights = (
                torch.from_numpy(part[start:end].copy()).long() for part in (row.input_ids, row.weights)
            )
            labels = ids.masked_fill(weights == 0, -100)
            if (labels[1:] != -100).any():
                # transformers' own shift and mean.
                with torch.no_grad():
                    logits = model(input_ids=ids[None], attention_mask=None).logits
                loss = model.loss_function(logits=logits, labels=labels[None], vocab_size=logits.shape[-1])
                alone.append(float(loss))
    optimizers = build_optimizers(model, settings.optimizer)
    set_lr(optimizers, lr=0.0, adamw_lr=0.0)
    rows = stage_rows(plan, 0, 8, seed=0)
    result = train_step(model, optimizers, rows, rows_per_micro_batch=rows_per_micro_batch, max_grad_norm=1.0)
    assert len(alone) > 8, "several documents stand in a row"
    assert result.loss == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def test_a_mean_over_steps_is_the_running_one_of_prolong(data_root: Path, tmp_path: Path) -> None:
    """ProLong divides the sum of a step by the mean of all steps so far; a step with few labels moves little.

    Nothing is learnt at such a rate, so both runs see the same sums.
    """
    losses_by, weights = {}, []
    for over in ("tokens", "steps"):
        settings = config(
            stages=[{**stages(0, loss_average=over, lr=1e-30, adamw_lr=1e-30)[0], "batch_tokens": 64}]
        )
        out = tmp_path / over
        train(settings, out, data_root=data_root)
        if over == "steps":
            plan = plan_stage(settings.stages[0], data_root=data_root, seed=settings.seed)
            count = settings.stages[0].rows_per_step
            weights = [
                total_weight(stage_rows(plan, step * count, count, seed=settings.seed))
                for step in range(settings.stages[0].num_steps)
            ]
        losses_by[over] = losses(out)
    assert len(set(weights)) > 1, "all steps weigh alike"
    means = [sum(weights[: step + 1]) / (step + 1) for step in range(len(weights))]
    expected = [
        loss * own / mean for loss, own, mean in zip(losses_by["tokens"], weights, means, strict=True)
    ]
    assert losses_by["steps"] == pytest.approx(expected, rel=1e-6)


def test_a_run_learns_changes_rope_between_stages_and_leaves_loadable_models(
    data_root: Path, tmp_path: Path
) -> None:
    """RoPE of the second stage has to reach the model and its exported config."""
    settings = config(tokenizer="tokenizer")
    result = train(settings, tmp_path / "run", data_root=data_root)
    assert (result.models["long"] / "tokenizer.json").exists()
    records = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[5]["loss"] < 0.9 * records[0]["loss"]
    assert set(records[0]["loss_by_source"]) == {"even", "odd"}
    assert result.tokens == records[-1]["tokens"] == 6 * 128 + 6 * 96
    thetas = [
        json.loads((result.models[name] / "config.json").read_text())["rope_parameters"]["rope_theta"]
        for name in ("short", "long")
    ]
    assert thetas == [10000.0, 50000.0]
    hashes = [
        record["rope"]
        for record in read_jsonl(tmp_path / "run" / "events.jsonl")
        if record["event"] == "stage"
    ]
    assert len(set(hashes)) == 2
    assert (tmp_path / "run" / "COMPLETE").exists()


def test_same_seed_same_bits_other_seed_other_run(data_root: Path, tmp_path: Path) -> None:
    """Hidden global random state would make two runs differ; an ignored seed would make them equal."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(config(seed=seed), tmp_path / name, data_root=data_root)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(data_root: Path) -> None:
    """One overflow must not turn every parameter into NaN."""
    settings = config()
    assert settings.model.hf_config is not None
    model = build_model(settings.model.hf_config, seed=1)
    optimizers = build_optimizers(model, settings.optimizer)
    set_lr(optimizers, lr=0.02, adamw_lr=0.004)
    plan = plan_stage(settings.stages[0], data_root=data_root, seed=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = float("inf")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = train_step(model, optimizers, plan.mixer.rows(0, 2), rows_per_micro_batch=2, max_grad_norm=1.0)
    assert result.loss is None and result.grad_norm is None
    for left, right in zip(model.parameters(), before):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": stages(1, tokens="2M")}, r"longer than its data.*rows in one epoch"),
        (
            {"stages": stages(0, context_length=100000, batch_tokens=100000, micro_batch_tokens=None)},
            "one row",
        ),
        ({"stages": stages(0, streams={"text": {"store": "missing"}})}, "missing"),
        ({"stages": stages(0, rope={"rope_type": "yarm"})}, "yarm"),
    ],
)
def test_mistakes_are_found_before_the_first_step(
    data_root: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """A stage that cannot finish must not be found out after days of training the stage before it."""
    with pytest.raises((ConfigError, DataError)) as error:
        train(config(**changes), tmp_path / "run", data_root=data_root)
    assert not (tmp_path / "run" / "checkpoints").exists()
    import re

    assert re.search(message, str(error.value).replace("\n", " "))


def test_a_misspelt_key_names_the_right_one() -> None:
    """A silently ignored setting is the commonest way to train the wrong thing."""
    values = recipe()
    values["stages"][1]["contxt_length"] = 5
    with pytest.raises(ConfigError, match=r"stages\.1\.contxt_length.*did you mean 'context_length'"):
        TrainConfig.from_dict(values, where="recipe.yaml")


def test_the_plan_counts_rows_of_each_stream(data_root: Path) -> None:
    """Two streams of weight 1 share the rows of a stage."""
    plan = plan_run(config(), data_root=data_root)
    assert plan.stages[0].rows_needed == {"text": 24, "weighted": 24}


def test_a_rate_beside_muon_is_refused_where_there_is_no_muon() -> None:
    """AdamW alone trained at adamw_lr, while lr had no effect and stood in the metrics."""
    with pytest.raises(ConfigError, match="adamw_lr is the rate beside Muon"):
        TrainConfig.from_dict(recipe(optimizer={"name": "adamw"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": stages(0, streams={"text": {"store": "missing"}})}, "missing"),
        ({"model": {"hf_config": {**recipe()["model"]["hf_config"], "model_type": "lama"}}}, "lama"),
        ({"model": {"hf_config": {**recipe()["model"]["hf_config"], "num_attention_heads": 5}}}, "multiple"),
        ({"model": {"path": "/no/such/model"}}, "cannot load a model"),
    ],
)
def test_a_mended_recipe_may_use_the_same_folder(
    data_root: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """A misspelt store left a run folder behind, which refused the mended recipe as other settings."""
    with pytest.raises((ConfigError, DataError), match=message):
        train(config(**changes), tmp_path / "run", data_root=data_root)
    assert not (tmp_path / "run").exists()


def test_a_rope_that_the_model_family_refuses_is_found_before_the_first_stage(
    data_root: Path, tmp_path: Path
) -> None:
    """The second stage's RoPE was tried only when the first stage had been trained."""
    fields = {**recipe()["model"]["hf_config"], "model_type": "phi3", "pad_token_id": 0}
    values = stages(1, rope={"rope_type": "linear", "factor": 3.0})
    with pytest.raises(ConfigError, match="longrope"):
        train(config(model={"hf_config": fields}, stages=values), tmp_path / "run", data_root=data_root)
    assert not (tmp_path / "run").exists()


def test_a_model_path_starts_where_stores_start(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It started in the working directory: a recipe that names a folder beside its stores found no model."""
    fields = recipe()["model"]["hf_config"]
    save_model(build_model(fields, seed=1), data_root / "models" / "base", replace=True)
    monkeypatch.chdir(tmp_path)
    settings = config(model={"path": "models/base"}, stages=stages(0)[:1])
    result = train(settings, tmp_path / "run", data_root=data_root)
    assert (result.models["short"] / "model.safetensors").exists()


def test_a_model_with_too_small_a_vocabulary_is_named(data_root: Path, tmp_path: Path) -> None:
    """The embedding's IndexError reached the user as a traceback."""
    fields = {**recipe()["model"]["hf_config"], "vocab_size": 200}
    with pytest.raises(DataError, match=r"(?s)outside the model's vocabulary.*0 to 199"):
        train(config(model={"hf_config": fields}), tmp_path / "run", data_root=data_root)


def test_stores_of_different_tokenizers_are_not_mixed(data_root: Path, tmp_path: Path) -> None:
    """The same id is another word in the other store: the model learnt from noise without a word."""
    other = train_bpe(["one two three"], tmp_path / "tokenizer", vocab_size=270)
    tokenize_corpus([str(data_root / "plain.jsonl")], other, tmp_path / "other", source_field="source")
    streams = {"text": {"store": "plain"}, "other": {"store": str(tmp_path / "other")}}
    with pytest.raises(DataError, match="different tokenizers"):
        plan_run(config(stages=stages(0, streams=streams)), data_root=data_root)


def test_a_misspelt_tokenizer_is_found_before_the_first_step(data_root: Path) -> None:
    """Model folders were written without a tokenizer, and no word was said."""
    with pytest.raises(ConfigError, match=r"(?s)not a folder.*tokeniser"):
        plan_run(config(tokenizer="tokeniser"), data_root=data_root)


def test_a_tokenizer_that_did_not_make_the_stores_is_told(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The exported folder would encode text into ids that the model never learnt."""
    train_bpe(["one two three"], tmp_path / "tokenizer", vocab_size=270)
    monkeypatch.setattr(logging.getLogger("longspan"), "propagate", True)
    plan_run(config(tokenizer="tokenizer"), data_root=data_root)
    assert "is not the one that made" not in caplog.text
    plan_run(config(tokenizer=str(tmp_path / "tokenizer")), data_root=data_root)
    assert "is not the one that made the token stores" in caplog.text


def test_a_model_smaller_than_the_vocabulary_is_told_before_training(
    data_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The dry run passed, and the first id beyond the model ended the run, maybe days later."""
    monkeypatch.setattr(logging.getLogger("longspan"), "propagate", True)
    fields = {**recipe()["model"]["hf_config"], "vocab_size": 200}
    plan_run(config(model={"hf_config": fields}), data_root=data_root)
    assert "the model has 200: an id beyond them ends the run" in caplog.text


def test_a_finished_run_is_left_as_it_is(data_root: Path, tmp_path: Path) -> None:
    """Without its checkpoints, which take the most room, it was trained once more from the start."""
    settings = config(stages=stages(0)[:1])
    first = train(settings, tmp_path / "run", data_root=data_root)
    written = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert train(settings, tmp_path / "run", data_root=data_root) == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == written
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_model_folder_that_a_kill_left_half_written_goes(data_root: Path, tmp_path: Path) -> None:
    """Each kill during an export left a copy of the model behind for good."""
    half = tmp_path / "run" / "stages" / ".short.0123abcd.tmp"
    half.mkdir(parents=True)
    train(config(stages=stages(0)[:1]), tmp_path / "run", data_root=data_root)
    assert not half.exists()


def broken_base(folder: Path) -> Path:
    """A model one of whose weights is not a number."""
    hf_config = recipe()["model"]["hf_config"]
    model = build_model(hf_config, seed=0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    save_model(model, folder)
    return folder


def test_a_run_without_a_single_step_is_not_complete(data_root: Path, tmp_path: Path) -> None:
    """Every step was skipped, the exit code was 0 and the model that came out was the one that went in."""
    base = broken_base(tmp_path / "base")
    validation = {"stores": {"held out": "plain"}, "lengths": [8], "windows": 2}
    settings = config(
        model={"path": str(base)}, tokenizer="tokenizer", validation=validation,
        optimizer={"name": "adamw"}, stages=[{**recipe()["stages"][0], "adamw_lr": None, "tokens": 256}],
    )  # fmt: skip
    for _ in range(2):  # The same when it is started again.
        with pytest.raises(RunError, match="every step was skipped"):
            train(settings, tmp_path / "run", data_root=data_root)
    assert losses(tmp_path / "run") == [None, None]
    measured = list(read_jsonl(tmp_path / "run" / "validation.jsonl"))
    assert [record["loss"] for record in measured] == [None, None]
    assert not (tmp_path / "run" / "COMPLETE").exists()
    assert not (tmp_path / "run" / "stages" / "short").exists()


def test_a_run_that_diverged_is_not_complete(data_root: Path, tmp_path: Path) -> None:
    """One step blew the weights up, all others were skipped, and the exit code was 0."""
    stage = {**recipe()["stages"][0], "adamw_lr": None, "tokens": 384, "lr": 1e30}
    settings = config(optimizer={"name": "adamw"}, stages=[stage])
    with pytest.raises(RunError, match="diverged: its last 2 of 3 steps were skipped"):
        train(settings, tmp_path / "run", data_root=data_root)
    assert not (tmp_path / "run" / "COMPLETE").exists()


def test_settings_that_change_no_number_may_change_when_a_run_goes_on(
    data_root: Path, tmp_path: Path
) -> None:
    """A full disk could not be mended by another `keep`: the run was refused as one with other settings."""
    out = tmp_path / "run"
    train(config(tokenizer="tokenizer"), out, data_root=data_root)
    whole = losses(out)
    for path in (out / "COMPLETE", *out.glob("stages/*"), *sorted(out.glob("checkpoints/*"))[-1:]):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    changed = [
        {**stage, "micro_batch_tokens": stage["batch_tokens"], "max_epochs": 20}
        for stage in recipe()["stages"]
    ]
    other = config(
        tokenizer="tokenizer",
        stages=changed, checkpoint={"every_steps": 1, "keep": 1}, runtime={"expandable_segments": False},
    )  # fmt: skip
    train(other, out, data_root=data_root)
    assert losses(out) == pytest.approx(whole, rel=1e-5)
    assert len(list((out / "checkpoints").iterdir())) == 1
    started = [record for record in read_jsonl(out / "events.jsonl") if record["event"] == STARTED]
    assert [record["checkpoint"]["keep"] for record in started] == [2, 1]
    with pytest.raises(ConfigError, match=r"stages\.0\.lr"):
        train(config(tokenizer="tokenizer", stages=stages(0, lr=0.01)), out, data_root=data_root)


def test_the_language_model_of_a_larger_one_is_trained_alone(data_root: Path, tmp_path: Path) -> None:
    """Its RoPE and length were put beside the settings for images, and training ended in a traceback."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=16, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    both = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    both.save_pretrained(tmp_path / "both")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected = both.eval()(ids).logits
        torch.testing.assert_close(load_model(tmp_path / "both").eval()(ids).logits, expected)
    settings = config(
        model={"path": str(tmp_path / "both")}, tokenizer="tokenizer", optimizer={"name": "adamw"},
        stages=[{**recipe()["stages"][0], "adamw_lr": None, "tokens": 256, "context_length": 32}],
    )  # fmt: skip
    result = train(settings, tmp_path / "run", data_root=data_root)
    written = json.loads((result.models["short"] / "config.json").read_text())
    assert written["architectures"] == ["Gemma3ForCausalLM"] and written["max_position_embeddings"] == 32
    assert all(loss is not None for loss in losses(tmp_path / "run"))
