"""The card of an exported model says what records of that model show, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from longspan.core.errors import DataError
from longspan.report.card import model_card
from longspan.report.load import load_runs
from tests.report.synthetic_run import header, sample_line, write_lines, write_records

CONFIG = {"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "yarn", "factor": 8.0}}


def make_run(path: Path) -> Path:
    """Records of two models: `after` answers 20 of 20, `before` none."""
    for label, score in (("before", 0.0), ("after", 1.0)):
        head = header("needle", label)
        head["model"]["fingerprint"] = f"weights-{label}"
        head["params"]["needle"] = "The | number `is` {number}.\n## Scores"
        lines = [
            sample_line(f"s{i}", None if i == 20 else score, length=1024, depth=0.5, sample=i)
            for i in range(21)
        ]
        write_records(path / "records" / f"needle-{label}.jsonl", head, lines)
    return path


def card_of(run: Path, fingerprint: str = "weights-after", base: str | None = "org/base") -> str:
    return model_card(
        load_runs([run]), fingerprint=fingerprint, name="long", config={"text_config": CONFIG}, base=base
    )


def test_a_card_says_what_was_measured_of_its_model_alone(tmp_path: Path) -> None:
    """Guards against the numbers of another model of the same run on the card."""
    card = card_of(make_run(tmp_path / "run"))
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/base" and head["library_name"] == "transformers"
    assert "| needle | 1,024 | 1,024: 100% (84% to 100%; 20) |" in card
    assert "0%" not in card.replace("100%", "").replace("80%", "")
    assert "--max-model-len 2048" in card and "RoPE yarn, factor 8" in card and "## Perplexity" not in card
    assert "| needle | < 1,024 |" in card_of(tmp_path / "run", "weights-before")


def test_text_of_records_cannot_write_into_the_card(tmp_path: Path) -> None:
    """Guards against a needle that ends a cell, a piece of code or a line."""
    card = card_of(make_run(tmp_path / "run"))
    assert "\n## Scores" not in card and "`is`" not in card


def test_training_alone_and_other_models_are_nothing_for_a_card(tmp_path: Path) -> None:
    """Guards against a card without a number, or of a model that was evaluated with another RoPE."""
    run = make_run(tmp_path / "run")
    with pytest.raises(DataError, match="no record is of the model") as error:
        card_of(run, "weights-other")
    assert "after: weights-after" in str(error.value)
    write_lines(tmp_path / "train" / "metrics.jsonl", [{"step": 1, "tokens": 10, "loss": 1.0}])
    with pytest.raises(DataError, match="no record"):
        card_of(tmp_path / "train")


def test_a_base_on_this_machine_is_no_name_on_the_hub(tmp_path: Path) -> None:
    """Guards against a folder of the author's machine as base_model, which the hub refuses."""
    card = card_of(make_run(tmp_path / "run"), base=str(tmp_path / "base"))
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
