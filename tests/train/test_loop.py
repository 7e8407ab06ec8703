"""What a run says of itself and how it begins: validation, metrics, trackers, profile, another run's checkpoint."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from longspan.core.errors import ConfigError, DataError, MissingDependencyError
from longspan.core.records import read_jsonl
from longspan.data.rows.loader import PackedRow
from longspan.data.store import TokenStore
from longspan.models.hf import load_model
from longspan.parallel.launch import spawn_local
from longspan.train.batch import collate
from longspan.train.config import TrainConfig
from longspan.train.loop_config import ValidationConfig
from longspan.train.metrics import LossBreakdown, StepFlops
from longspan.train.tracking import scalars
from longspan.train.trainer import train
from longspan.train.validation import plan_validation
from tests.patience import PATIENCE_SECONDS
from tests.train.conftest import recipe

VALIDATION = {"stores": {"held out": "plain"}, "lengths": [8, 24], "windows": 3, "every_steps": 4}


def records(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return list(read_jsonl(out / name))


def row(lengths: list[int]) -> PackedRow:
    count = sum(lengths)
    return PackedRow(
        input_ids=np.arange(count),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        documents=np.arange(len(lengths), dtype=np.uint32),
        sources=np.zeros(len(lengths), np.uint16),
        source_names=("web",),
        continuation=np.zeros(len(lengths), bool),
        weights=np.ones(count, np.uint8),
    )


@pytest.fixture(scope="module")
def run(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loop") / "run"
    config = TrainConfig.from_dict(recipe(validation=VALIDATION))
    train(config, out, data_root=data_root, profile=True)
    return out


def test_perplexity_by_length_is_that_of_the_saved_model(run: Path, data_root: Path) -> None:
    """Measured in training mode, on other windows or with a shifted label it would not be the model's."""
    lines = records(run, "validation.jsonl")
    # Before the first step, every fourth one and the last of each stage (6 and 12).
    assert [line["step"] for line in lines if line["length"] == 8] == [0, 4, 6, 8, 12]
    assert lines[-1]["perplexity"] < lines[1]["perplexity"] / 2
    plan = plan_validation(ValidationConfig.from_dict(VALIDATION), data_root=data_root, seed=3)
    model = load_model(run / "stages" / "long").eval()
    for windows, line in zip(plan.windows, lines[-2:]):
        assert (windows.name, windows.length, len(windows.rows)) == ("held out", line["length"], 3)
        ids = torch.from_numpy(np.stack([each.input_ids for each in windows.rows]))
        with torch.no_grad():
            logits = torch.cat([model(input_ids=each[None], use_cache=False).logits for each in ids])
        expected = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        assert line["loss"] == pytest.approx(expected, abs=1e-5)
        assert line["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
        assert line["labels"] == 3 * (line["length"] - 1)


def test_validation_windows_are_beginnings_of_long_documents(data_root: Path) -> None:
    """A window over two documents measures how hard it is to guess where the second begins."""
    config = ValidationConfig.from_dict({**VALIDATION, "lengths": [30], "windows": 100})
    windows = plan_validation(config, data_root=data_root, seed=0).windows[0]
    store = TokenStore(data_root / "plain")
    long = [index for index in range(len(store)) if len(store.tokens(index)) >= 30]
    assert [int(each.documents[0]) for each in windows.rows] == long
    for each in windows.rows:
        np.testing.assert_array_equal(each.input_ids, store.tokens(int(each.documents[0]))[:30])
    with pytest.raises(ConfigError, match="no document for windows of 5000 tokens"):
        plan_validation(
            ValidationConfig.from_dict({**VALIDATION, "lengths": [5000]}), data_root=data_root, seed=0
        )


def validate_on_two(rank: int, runs: list[tuple[dict[str, Any], str]], data_root: str) -> None:
    for values, out in runs:
        train(TrainConfig.from_dict(values), out, data_root=data_root)


@pytest.mark.slow
def test_ranks_measure_the_same_perplexity(run: Path, data_root: Path, tmp_path: Path) -> None:
    """Three windows on two data-parallel ranks: one window too many counted, or one rank that waits for ever."""
    runs = [
        (
            recipe(validation=VALIDATION, parallel={**degrees, "timeout_seconds": PATIENCE_SECONDS}),
            str(tmp_path / name),
        )
        for name, degrees in {"data parallel": {"dp_shard": 2}, "ring": {"cp_ring": 2}}.items()
    ]
    spawn_local(validate_on_two, 2, runs, str(data_root), timeout_seconds=PATIENCE_SECONDS)
    for _, out in runs:
        for one, two in zip(
            records(run, "validation.jsonl"), records(Path(out), "validation.jsonl"), strict=True
        ):
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert two["labels"] == one["labels"] and two["step"] == one["step"]


def test_every_line_says_what_the_step_cost(run: Path) -> None:
    """A column that is sometimes absent breaks whoever reads the file."""
    lines = records(run)
    assert len({tuple(sorted(line)) for line in lines}) == 1
    for line in lines:
        assert line["tokens_per_s"] > 0 and line["tflops"] > 0 and line["peak_memory_bytes"] > 1e6
        assert 0 <= line["data_wait_s"] <= line["seconds"]
        assert line["mfu"] is None, "nothing is known of the peak of a CPU"
        assert line["loss_by_length"].keys() == {"0-128"}
    # Checkpoints follow steps 2, 4 and 6 of each stage; the wait is told with the step after.
    assert [line["checkpoint_s"] > 0 for line in lines[:6]] == [False, False, True, False, True, False]
    saved = [event for event in records(run, "events.jsonl") if event["event"] == "checkpoint"]
    assert [event["step"] for event in saved] == [2, 4, 6, 8, 10, 12]
    assert all(event["bytes"] > 10000 and event["write_seconds"] > 0 for event in saved)


def test_loss_is_told_by_the_length_of_the_document() -> None:
    """A document of 128 tokens belongs to the first bucket, one of 129 to the second; padding to none."""
    batch = collate([row([128, 129, 300])])
    breakdown = LossBreakdown()
    assert batch.lengths is not None
    breakdown.add(batch, batch.lengths.float())
    assert breakdown.by_length() == {"0-128": 128.0, "128-256": 129.0, "256-512": 300.0}


def test_flops_are_those_of_the_documents_and_attention_counts_once() -> None:
    """Twice 4 tokens attend to 2 * 4^2 pairs and not to 8^2; frozen weights need no gradient."""
    config = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    cpu = torch.device("cpu")
    flops = StepFlops(config, frozen=False, device=cpu, num_devices=2)
    linear = 2 * (4 * 8 * 8 + 3 * 8 * 16 + 10 * 8)
    attention = 2 * (4**2 + 4**2) * 8
    assert flops.of([row([4, 4])]) == 3 * (8 * linear + attention)
    assert flops.rates([row([4, 4])], 2.0) == (round(3 * (8 * linear + attention) / 4e12, 6), None)
    frozen = StepFlops(config, frozen=True, device=cpu, num_devices=1)
    assert frozen.of([row([4, 4])]) == 2 * 8 * linear + 3 * attention
    # A branch of 4 tokens at position 3 has the pairs of a document of 7 without those of one of 3.
    tree = row([4, 4])._replace(branches=np.array([[-1, 0], [0, 3]]))
    assert flops.of([tree]) == 3 * (8 * linear + 2 * (4**2 + 7**2 - 3**2) * 8)


def test_a_profile_shows_the_operations_of_a_step(run: Path) -> None:
    """A profile that was never stepped is an empty file."""
    assert sorted(path.name for path in (run / "profile").iterdir()) == ["rank-0.json", "rank-0.txt"]
    assert "aten::mm" in (run / "profile" / "rank-0.txt").read_text()


def test_a_run_begins_with_weights_or_moments_of_another(run: Path, data_root: Path, tmp_path: Path) -> None:
    """The state of the other run must arrive, in the part that is asked for, and nothing of its counters."""
    stage = {**recipe()["stages"][1], "optimizer_state": "fresh", "lr_schedule": {"kind": "constant"}}
    losses = {}
    for name, init in {
        "neither": None,
        "weights": {"path": str(run)},
        "both": {"path": str(run / "checkpoints" / "step-00000012"), "optimizer": True},
        "moments": {"path": str(run), "weights": False, "optimizer": True},
    }.items():
        values = recipe(stages=[stage], init_from=init)
        train(TrainConfig.from_dict(values), tmp_path / name, data_root=data_root)
        lines = records(tmp_path / name)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        losses[name] = [line["loss"] for line in lines]
    assert losses["weights"][0] == losses["both"][0] < losses["neither"][0] - 0.5
    assert losses["moments"][0] == losses["neither"][0]
    assert losses["both"][1] != losses["weights"][1] and losses["moments"][1] != losses["neither"][1]


def test_a_checkpoint_of_another_model_or_nowhere_is_named(
    run: Path, data_root: Path, tmp_path: Path
) -> None:
    """Half of the weights of another model would train without an error."""
    values = recipe(init_from={"path": str(tmp_path / "absent")})
    with pytest.raises(DataError, match=r"absent is not a checkpoint"):
        train(TrainConfig.from_dict(values), tmp_path / "out", data_root=data_root)
    assert not (tmp_path / "out").exists()
    values = recipe(init_from={"path": str(run)})
    values["model"]["hf_config"]["hidden_size"] = 48
    with pytest.raises(DataError, match="does not fit the model"):
        train(TrainConfig.from_dict(values), tmp_path / "out", data_root=data_root)
    values["init_from"] |= {"weights": False, "optimizer": True}
    with pytest.raises(DataError, match=r"the moments in .* are not those of this model"):
        train(TrainConfig.from_dict(values), tmp_path / "out", data_root=data_root)
    assert not (tmp_path / "out").exists(), "what is refused leaves nothing that the mended recipe meets"
    with pytest.raises(ConfigError, match="weights, optimizer or both"):
        TrainConfig.from_dict(recipe(init_from={"path": "x", "weights": False}))


def test_settings_without_effect_are_refused() -> None:
    """A floor that is never reached looks like one that is."""
    for settings, words in (
        ({"kind": "constant", "floor": 0.0}, "floor has no effect"),
        ({"kind": "constant", "decay_fraction": 0.2}, "decay_fraction has no effect"),
    ):
        stage = {**recipe()["stages"][0], "lr_schedule": settings}
        with pytest.raises(ConfigError, match=words):
            TrainConfig.from_dict(recipe(stages=[stage]))
    for memory, words in (
        ({"offload_chunk_cache": True}, "without chunk_tokens"),
        ({"chunk_tokens": 8}, "whole rows"),
    ):
        with pytest.raises(ConfigError, match=words):
            TrainConfig.from_dict(recipe(memory=memory, parallel={"cp_ring": 2}))


def test_rows_in_chunks_have_the_same_losses(run: Path, data_root: Path, tmp_path: Path) -> None:
    """A setting that does not reach the step saves nothing, in silence; here the chunk divides nothing."""
    values = recipe(memory={"chunk_tokens": 13})
    train(TrainConfig.from_dict(values), tmp_path / "run", data_root=data_root)
    expected = [line["loss"] for line in records(run)]
    assert [line["loss"] for line in records(tmp_path / "run")] == pytest.approx(expected, abs=1e-4)


def test_a_tracker_that_is_not_installed_is_told_before_any_work(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found at the first line, hours of loading are lost."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    values = recipe(tracking={"wandb": {"project": "p"}})
    with pytest.raises(MissingDependencyError, match=r"longspan\[track\]"):
        train(TrainConfig.from_dict(values), tmp_path / "run", data_root=data_root)
    assert not (tmp_path / "run").exists()


def test_wandb_sees_every_number_of_a_run(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names must be flat, and a run that goes on must be the same run there."""
    logged: list[tuple[int, dict[str, float]]] = []
    begun: list[dict[str, Any]] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            logged.append((step, numbers))

        def finish(self) -> None:
            logged.append((-1, {}))

    fake = types.SimpleNamespace(init=lambda **settings: begun.append(settings) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    values = recipe(tracking={"wandb": {"project": "p"}}, validation=VALIDATION)
    train(TrainConfig.from_dict(values), tmp_path / "run", data_root=data_root)
    assert [settings["project"] for settings in begun] == ["p", "p"]
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["resume"] == "allow"
    assert begun[0]["config"]["stages"][0]["name"] == "short"
    lines = records(tmp_path / "run")
    seen = {step: numbers["train/loss"] for step, numbers in logged if "train/loss" in numbers}
    assert seen == {line["step"]: line["loss"] for line in lines}
    assert any("validation/held out/24/perplexity" in numbers for _, numbers in logged)
    assert logged[-1] == (-1, {})


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_files_appear(data_root: Path, tmp_path: Path) -> None:
    """The one thing that the package's own tests cannot know: that we call it."""
    values = recipe(tracking={"tensorboard": True})
    train(TrainConfig.from_dict(values), tmp_path / "run", data_root=data_root)
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


def test_names_of_numbers_are_flat() -> None:
    """Nested names, missing values and words are no numbers."""
    record = {"loss": 2, "lr": None, "stage": "80k", "done": True, "loss_by_source": {"web": 2.5}}
    assert scalars(record, "train") == {"train/loss": 2.0, "train/loss_by_source/web": 2.5}


@pytest.mark.slow
# torch warns of its own doings while it compiles.
@pytest.mark.filterwarnings("default")
def test_compiled_blocks_have_the_same_losses(run: Path, data_root: Path, tmp_path: Path) -> None:
    """Tables of documents inside a compiled block are turned into tensors, which they are not."""
    for name, more in {
        "plain": {},
        "checkpointed": {"memory": {"activation_checkpointing": "full"}},
        "bfloat16": {"memory": {"compute_dtype": "bfloat16"}},
    }.items():
        values = recipe(runtime={"compile_blocks": True}, **more)
        train(TrainConfig.from_dict(values), tmp_path / name, data_root=data_root)
        expected = [line["loss"] for line in records(run)]
        tolerance = 0.05 if name == "bfloat16" else 1e-4
        assert [line["loss"] for line in records(tmp_path / name)] == pytest.approx(expected, abs=tolerance)
