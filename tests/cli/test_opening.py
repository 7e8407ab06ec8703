"""What `--model` may name, and what is changed about it before it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RECIPE = """\
model: {path: base}
tokenizer: tokenizer
lora: {rank: 4}
checkpoint: {every_steps: 2}
stages:
  - name: long
    context_length: 128
    tokens: 1024
    batch_tokens: 256
    lr: 1e-2
    rope: {rope_type: default, rope_theta: 5e5}
    streams:
      text: {store: store}
"""
TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture
def run(longspan, store):
    """A finished run of four steps that trained an adapter; the tokenizer is the recipe's."""
    from longspan.models.hf import build_model, save_model

    save_model(build_model(TINY, seed=0), "base", tokenizer="tokenizer")
    Path("lora.yaml").write_text(RECIPE)
    outcome = longspan("train lora.yaml --out run")
    assert outcome.code == 0, outcome.err
    return Path("run")


def measure(longspan, model: Path | str, label: str, *more: str) -> tuple[float, dict]:
    """Return the loss of some text, and what the header says of the model."""
    line = (
        f"eval ppl --model {model} --data store --lengths 64 --num-spans 1 --out eval --json --label {label}"
    )
    outcome = longspan([*line.split(), *more])
    assert outcome.code == 0, outcome.err
    header = json.loads(Path(f"eval/records/ppl-{label}.jsonl").read_text().splitlines()[0])
    return sum(row["nll"] for row in json.loads(outcome.out)["by_length"]), header["model"]


def test_run_stage_and_checkpoint_are_the_same_model(longspan, run):
    """An adapter that is left out answers as its base does, and nobody notices."""
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    found = [
        measure(longspan, path, f"m{number}")
        for number, path in enumerate((run, run / "stages" / "long", checkpoint))
    ]
    losses = [loss for loss, _ in found]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert all(model["rope"]["rope_theta"] == 5e5 for _, model in found)
    assert losses[0] != pytest.approx(measure(longspan, "base", "base")[0], rel=1e-6)
    narrow, model = measure(longspan, checkpoint, "narrow", "--dtype", "bfloat16")
    assert model["dtype"] == "bfloat16" and losses[0] != narrow == pytest.approx(losses[0], rel=0.01)


def test_a_gpu_computes_in_bf16_unless_told(longspan, run, monkeypatch, caplog):
    """Stages are saved in 32 bits, which no flash kernel takes: a model just trained was evaluated by the slow path."""
    import torch
    from transformers import PreTrainedModel

    from longspan.infer.config import AnswererConfig
    from longspan.infer.opening import load_weights
    from longspan.steps.opening import load_checkpoint

    monkeypatch.setattr(PreTrainedModel, "to", lambda model, device: model)
    cuda = torch.device("cuda")
    checkpoint = str(sorted((run / "checkpoints").iterdir())[-1])
    for path, load in (("base", None), (str(run / "stages" / "long"), None), (checkpoint, load_checkpoint)):
        caplog.clear()
        for dtype in (None, "float32", "float16"):
            model = load_weights(AnswererConfig(model=path, dtype=dtype), load=load, device=cuda)
            kept = {p.dtype for name, p in model.named_parameters() if "lora_" not in name}
            assert kept == {getattr(torch, dtype or "bfloat16")}, (path, dtype)
            assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)
            assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert [line for line in caplog.messages if "computed in bfloat16" in line]
        on_cpu = load_weights(AnswererConfig(model=path), load=load, device=torch.device("cpu"))
        assert on_cpu.dtype == torch.float32


def test_base_of_the_rope_changes_and_nothing_else(longspan, run):
    """The seeds scale every model that they evaluate, those named as they are too."""
    plain, model = measure(longspan, "base", "plain")
    assert model["rope"] == {"rope_type": "default", "rope_theta": 10000.0}
    other, changed = measure(longspan, "base", "theta", "--rope-theta", "5e5")
    assert changed["rope"] == {"rope_type": "default", "rope_theta": 5e5}
    assert changed["fingerprint"] != model["fingerprint"]
    linear, scaled = measure(
        longspan, "base", "pi", "--rope", "{rope_type: linear, factor: 4}", "--rope-theta", "2e4"
    )
    assert (scaled["rope"]["factor"], scaled["rope"]["rope_theta"]) == (4, 2e4)
    assert len({plain, other, linear}) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model base --rope '{rope_type: default, rope_theta: 1}' --rope-theta 2", "given twice"),
        ("--model base --base-url http://localhost:1", "models behind a server"),
        ("--model base --tp 2 --cp 2", "either matrices or sequences"),
        ("--model base --max-length 32", "longer than the model is to be given"),
        ("--model base --chat-template llama-3", "the text itself"),
        ("--model run/checkpoints/step-00000004 --rope-theta 2", "the RoPE that it was trained with"),
        ("--model nowhere --label 'a b'", "part of a file name"),
    ],
)
def test_settings_that_do_not_go_together_are_named(longspan, run, line, message):
    """A setting that is silently dropped gives a number under another name."""
    outcome = longspan(f"eval ppl {line} --tokenizer tokenizer --data store --lengths 64 --out eval")
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_a_chat_server_is_told_of_thinking_in_its_own_words():
    """What was said of the template went nowhere: the server applies its own."""
    from longspan.api import ServerConfig
    from longspan.core.errors import ArgumentError
    from longspan.eval.prompts import PromptConfig
    from longspan.infer.config import AnswererConfig
    from longspan.steps.opening import _told, form_of

    extra = {"chat_template_kwargs": {"b": 2}}
    server = ServerConfig(base_url="http://localhost:1/v1", extra=extra, continue_final_message=True)
    model = AnswererConfig(model="openai:m", server=server)
    told = _told(model, PromptConfig(thinking="off", template_args={"a": 1}))
    kwargs = {"a": 1, "enable_thinking": False, "thinking": False, "b": 2}
    assert told.extra == {"chat_template_kwargs": kwargs} and told.continue_final_message
    assert _told(model, PromptConfig()).extra == {"chat_template_kwargs": {"b": 2}}
    # A provider refuses fields that it does not know; a text that is continued is rendered here.
    own = AnswererConfig(model="openai:m")
    assert _told(own, PromptConfig(thinking="on")) is None
    assert _told(AnswererConfig(model="completions:m"), PromptConfig(template_args={"a": 1})) is None
    with pytest.raises(ArgumentError, match="takes no variables"):
        _told(own, PromptConfig(template_args={"a": 1}))
    with pytest.raises(ArgumentError, match="has no tokenizer here"):
        form_of(model, PromptConfig())
