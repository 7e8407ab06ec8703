"""Adapters on a real model: the first loss, a killed run, two processes, peft and transformers afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from longspan.core.records import read_jsonl
from longspan.data.store import TokenStore
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import load_tokenizer
from longspan.models.export import export_model
from longspan.models.hf import load_model
from longspan.parallel.launch import spawn_local
from longspan.train import trainer
from longspan.train.config import TrainConfig
from longspan.train.trainer import train

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1800)]

LENGTH, STEPS = 320, 4


def recipe(model: Path, **changes: Any) -> dict[str, Any]:
    """Four steps of two rows of 320 tokens, in which documents stand apart."""
    stage = {
        "name": "long",
        "context_length": LENGTH,
        "steps": STEPS,
        "batch_tokens": 2 * LENGTH,
        "lr": 1e-3,
        "rope": {"rope_theta": 200_000.0},
        "max_epochs": 9,
        "streams": {"text": {"store": "store", "pack": {"strategy": "best_fit", "specials": "none"}}},
    }
    lora = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    values = {"model": {"path": str(model)}, "lora": lora, "stages": [stage]}
    return {"optimizer": {"name": "adamw"}, "checkpoint": {"every_steps": 2}, **values, **changes}


@pytest.fixture(scope="module")
def root(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of a few short texts: rows hold several, and each step sees most of them again."""
    folder = tmp_path_factory.mktemp("train")
    names = ("capitalize", "center", "count", "encode", "endswith", "expandtabs", "find", "format")
    texts = [f"{name}: {getattr(str, name).__doc__}" for name in names]
    for number, text in enumerate(texts):
        (folder / "texts").mkdir(exist_ok=True)
        (folder / "texts" / f"{number:03}.txt").write_text(text)
    tokenize_corpus([str(folder / "texts")], load_tokenizer(smollm2), folder / "store")
    return folder


@pytest.fixture(scope="module")
def run(smollm2: Path, root: Path) -> Path:
    train(TrainConfig.from_dict(recipe(smollm2)), root / "run", data_root=root)
    return root / "run"


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(run / "metrics.jsonl")]


def test_learns(run: Path) -> None:
    found = losses(run)
    assert len(found) == STEPS and found[-1] < found[0]


def test_first_loss_is_that_of_transformers(smollm2: Path, root: Path, tmp_path: Path) -> None:
    """One row of one document, with the stage's RoPE: a label or a position that is off by one shows here."""
    values = recipe(smollm2)
    store = {"store": "store", "pack": {"strategy": "intact", "specials": "none", "overflow": "drop_tail"}}
    values["stages"][0] |= {"steps": 1, "batch_tokens": LENGTH, "streams": {"text": store}}
    train(TrainConfig.from_dict(values), tmp_path / "run", data_root=root)
    # Whichever document came first, its loss by transformers alone is the one.
    model = AutoModelForCausalLM.from_pretrained(smollm2, attn_implementation="eager").eval()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 200_000.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    candidates = []
    store = TokenStore(root / "store")
    for number in range(len(store)):
        ids = torch.as_tensor(store.tokens(number).astype("int64"))[None, :LENGTH]
        if ids.shape[1] > 1:
            with torch.no_grad():
                candidates.append(model(ids, labels=ids).loss.item())
    (first,) = losses(tmp_path / "run")
    assert min(abs(first - loss) for loss in candidates) < 1e-5


def test_a_stopped_run_goes_on_with_the_same_losses(
    smollm2: Path, root: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters, their moments and the place in the data come back."""

    class Stopped(Exception):
        pass

    step, done = trainer.train_step, []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if len(done) == 3:
            raise Stopped
        done.append(1)
        return step(*args, **kwargs)

    config = TrainConfig.from_dict(recipe(smollm2))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(trainer, "train_step", stopping)
        train(config, root / "stopped", data_root=root)
    train(config, root / "stopped", data_root=root)
    assert losses(root / "stopped") == losses(run)


def _train(rank: int, values: dict[str, Any], out: str, root: str) -> None:
    train(TrainConfig.from_dict(values), out, data_root=root)


def test_a_ring_of_two_has_the_same_losses(smollm2: Path, root: Path, run: Path) -> None:
    """Grouped queries of 9 and 3 heads, documents over the border of two ranks."""
    values = recipe(smollm2, parallel={"cp_ring": 2})
    spawn_local(_train, 2, values, str(root / "ring"), str(root))
    assert losses(root / "ring") == pytest.approx(losses(run), abs=2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
def test_export_is_what_peft_has(smollm2: Path, run: Path, tmp_path: Path) -> None:
    """The adapter beside its base in peft, and the merged folder in plain transformers, are one model."""
    stage = run / "stages" / "long"
    export_model(load_model(stage), tmp_path / "merged", tokenizer=smollm2, generation=smollm2)
    ids = torch.arange(100, 160)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.rope_parameters["rope_theta"] == 200_000.0
    base = AutoModelForCausalLM.from_pretrained(smollm2)
    base.config.rope_parameters = merged.config.rope_parameters
    base.model.rotary_emb = type(base.model.rotary_emb)(base.config)
    adapted = peft.PeftModel.from_pretrained(base, stage)
    with torch.no_grad():
        expected, found = adapted(ids).logits, merged(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()
