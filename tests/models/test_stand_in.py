"""A tiny stand-in of a config shows what the family's forward pass refuses, before any weight is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.core.errors import ArgumentError
from longspan.models import stand_in
from longspan.models.documents import Documents
from longspan.models.stand_in import check_forward, check_unknown_family, small_config

LARGE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    stand_in._refusal.cache_clear()


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("doge", {}, "a mask of its own"),
        ("llama", {"attention_dropout": 0.1}, r"attention dropout(.|\n)*config_overrides"),
        ("gpt2", {"n_embd": 48, "n_head": 2}, "attn_pdrop"),
    ],
)
def test_what_a_forward_pass_refuses_is_found_before(
    family: str, fields: dict[str, Any], message: str
) -> None:
    """These build without a word, and a run fails at its first step with its folder made."""
    with pytest.raises(ArgumentError, match=f"a {family} model cannot be trained: (.|\n)*{message}"):
        check_forward(AutoConfig.for_model(family, **fields))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", LARGE),
        ("qwen3", {**LARGE, "head_dim": 128}),
        ("mistral", {**LARGE, "sliding_window": 4096}),
        ("gemma3_text", {}),
        ("mixtral", {}),
        ("gpt_neox", {}),
        ("gpt_oss", {}),
        ("deepseek_v3", {}),
        ("llama4_text", {}),
        ("gemma2", {}),
        ("phimoe", {"sliding_window": 2047}),
        ("phi3", {"pad_token_id": 32000}),
    ],
)
def test_what_trains_is_let_through(family: str, fields: dict[str, Any]) -> None:
    """A check that refuses a model because its stand-in was cut wrongly; the caller's random numbers stay."""
    config = AutoConfig.for_model(family, **fields)
    before, state = config.to_dict(), torch.random.get_rng_state()
    check_forward(config)
    assert config.to_dict() == before and torch.equal(torch.random.get_rng_state(), state)
    small = small_config(config)
    assert type(small) is type(config) and small.num_hidden_layers < config.num_hidden_layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small)
    assert sum(weight.numel() for weight in model.parameters()) < 3e7
    kinds = getattr(config, "layer_types", None)
    assert kinds is None or set(small.layer_types) == set(kinds)


def test_a_model_that_mixes_documents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that does not pass the document table on computes something, without a word."""
    whole = SimpleNamespace(from_cu_seqlens=lambda borders: Documents.single(borders[-1]))
    monkeypatch.setattr(stand_in, "Documents", whole)
    with pytest.raises(ArgumentError, match="something else than transformers does for each document alone"):
        check_forward(AutoConfig.for_model("llama"))


def test_a_config_that_cannot_be_made_small_is_let_through_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Families have rules of their own for their sizes; a false refusal would be worse than no check, and a check that
    did not happen must not look like one."""

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("sizes do not fit")

    monkeypatch.setattr(stand_in, "_built", fails)
    check_forward(AutoConfig.for_model("llama", attention_dropout=0.1))
    assert "no small stand-in of a llama model can be made (ValueError: sizes do not fit)" in caplog.text


def test_a_family_that_no_test_found_right_is_tried_when_it_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers of a model that computes something else; dropout, which is for training, is no reason to refuse."""
    tried: list[bool] = []
    monkeypatch.setattr(stand_in, "_refusal", lambda fields, *, training: tried.append(training))
    check_unknown_family(AutoConfig.for_model("llama"))
    assert not tried
    monkeypatch.setattr(stand_in, "RIGHT", frozenset())
    check_unknown_family(AutoConfig.for_model("llama"))
    assert tried == [False]
    monkeypatch.undo()
    check_forward(AutoConfig.for_model("llama", attention_dropout=0.1), training=False)
    with pytest.raises(ArgumentError, match=r"a doge model cannot be run: (.|\n)*a mask of its own"):
        check_unknown_family(AutoConfig.for_model("doge"))
