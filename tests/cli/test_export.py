"""`longspan export`: every folder that training leaves becomes the same model elsewhere, or one message."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

TRAIN = """\
model: {path: base}
tokenizer: tokenizer
lora: {rank: 4, quantize: nf4, trainable: [embed_tokens]}
checkpoint: {every_steps: 2}
stages:
  - name: long
    context_length: 256
    tokens: 2048
    batch_tokens: 512
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
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture
def run(longspan, store):
    """A finished run of four steps with a quantised base; the tokenizer is the recipe's."""
    from longspan.models.hf import build_model, save_model

    save_model(build_model(TINY, seed=0), "base")
    Path("lora.yaml").write_text(TRAIN)
    outcome = longspan("train lora.yaml --out run")
    assert outcome.code == 0, outcome.err
    return Path("run")


def greedy(model):
    ids = torch.arange(40, 60)[None]
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)


def test_stage_checkpoint_adapter_and_run_become_the_same_model(longspan, run):
    from transformers import AutoModelForCausalLM

    from longspan.models.hf import load_model

    stage = run / "stages" / "long"
    words = greedy(load_model(stage))
    assert longspan(f"export {stage} --adapter --out adapter").code == 0
    shutil.move("base", "moved")
    merged = []
    for name, source in (
        ("stage", stage),
        ("checkpoint", run / "checkpoints" / "step-00000004"),
        ("alone", "adapter"),
        ("last", run),
    ):
        outcome = longspan(f"export {source} --base moved --out {name} --json")
        assert outcome.code == 0, outcome.err
        report = json.loads(outcome.out)
        assert report["kind"] == "merged" and report["merge_error"] < 1e-3
        merged.append(Path(name, "model.safetensors").read_bytes())
        assert Path(name, "tokenizer.json").read_bytes() == Path("tokenizer/tokenizer.json").read_bytes()
    assert len(set(merged)) == 1
    model = AutoModelForCausalLM.from_pretrained("last")
    assert torch.equal(greedy(model), words)
    assert model.config.rope_parameters["rope_theta"] == 5e5
    assert model.config.max_position_embeddings == 256
    again = longspan("export last --out again --dtype bfloat16")
    assert again.code == 0 and "rounding to bfloat16" in again.out


def test_a_checkpoint_is_exported_from_any_folder(longspan, run, monkeypatch):
    """The base was looked for from the working folder, not from where training had found it."""
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    checkpoint = Path("..") / run / "checkpoints" / "step-00000004"
    for name, words in (("own", ""), ("named", "--base ../base")):
        outcome = longspan(f"export {checkpoint} {words} --out {name}")
        assert outcome.code == 0, outcome.err
    assert longspan("export --settings named --out again").code == 0  # what it wrote makes it again
    folders = [Path(name, "model.safetensors").read_bytes() for name in ("own", "named", "again")]
    assert folders[0] == folders[1] == folders[2]


def test_a_card_holds_the_records_of_what_is_exported(longspan, run):
    """The fingerprint of an adapter's records was looked for in the weights that merging makes."""
    evaluated = longspan(f"eval ppl --model {run} --data texts --lengths 64 --num-documents 2 --out {run}")
    assert evaluated.code == 0, evaluated.err
    outcome = longspan(f"export {run} --card {run} --out carded")
    assert outcome.code == 0, outcome.err
    card = Path("carded", "README.md").read_text()
    assert "## Perplexity" in card and "| 64 |" in card and "# carded" in card
    outcome = longspan(f"export base --card {run} --out other")
    assert outcome.code == 2 and "no record is of the model" in outcome.err and not Path("other").exists()


def test_what_cannot_be_exported_is_one_message_and_no_folder(longspan, run):
    stage = run / "stages" / "long"
    (run / "checkpoints" / "step-00000004" / "model-00000-of-00001.safetensors").write_bytes(b"torn")
    Path("empty").mkdir()
    for line, parts in (
        ("export absent --out out", ["absent is nothing to export", "no such folder"]),
        ("export empty --out out", ["empty is nothing to export", "adapter_config.json"]),
        ("export base --adapter --out out", ["base has no adapter"]),
        ("export base --base base --out out", ["--base is for adapters"]),
        ("export base --tokenizer empty --out out", ["empty has no tokenizer", "tokenizer.json"]),
        (f"export {stage} --adapter --dtype bfloat16 --out out", ["--dtype has no effect"]),
        (f"export {stage} --base tokenizer --out out", ["tokenizer is not a Hugging Face model folder"]),
        (
            f"export {run}/checkpoints/step-00000004 --out out",
            ["is damaged", "model-00000-of-00001.safetensors"],
        ),
        (f"export {stage} --out base", ["base already exists", "--out"]),
    ):
        outcome = longspan(line)
        assert outcome.code == 2, line
        assert "Traceback" not in outcome.err
        for part in parts:
            assert part in outcome.err, line
    assert not os.path.exists("out")
    shutil.rmtree(run / "stages" / "long")
    assert "is not done" in longspan(f"export {run} --out out").err


def test_a_gguf_file_beside_the_folder(longspan, model, monkeypatch):
    """llama.cpp's converter stands in; its file is made last, and what cannot be one is refused first."""
    from tests.models.test_gguf_file import CONVERTER

    Path("convert_hf_to_gguf.py").write_text(textwrap.dedent(CONVERTER))
    outcome = longspan("export model --rope-theta 3e4 --gguf f32 --converter . --out out --json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["gguf"] == "out/out-f32.gguf" and Path("out/out-f32.gguf").is_file()
    for options, part in (
        ("--rope rope_type=dynamic,factor=4 --gguf f16 --converter .", "cannot say this RoPE"),
        ("--gguf f16", "git clone"),
        ("--gguf f16 --converter nowhere", "there is no converter nowhere"),
        ("--gguf f16 --adapter --converter .", "a GGUF file holds a whole model"),
        ("--converter .", "has an effect with gguf alone"),
        ("--public", "the repository that push names"),
        ("--push name", "OWNER/NAME"),
    ):
        monkeypatch.setenv("PATH", "")
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        refused = longspan(f"export model {options} --out x")
        assert refused.code in (1, 2) and part in refused.err and not Path("x").exists(), options
    monkeypatch.setenv("STAND_IN", "forgets")
    failed = longspan("export model --rope-theta 3e4 --gguf f32 --converter . --out half")
    assert failed.code == 1 and "the base: 10000, the model's 30000" in failed.err
    assert not list(Path("half").glob("*gguf*")) and Path("half/model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_folder_on_the_hub(longspan, model, monkeypatch):
    """What is there is looked at before the model is loaded, and the token is in no output."""
    from tests.hub_server import TOKEN, hub_server
    from tests.models.test_hub_upload import use_hub

    with hub_server() as hub:
        use_hub(hub, monkeypatch)
        outcome = longspan("export model --push me/model --out out")
        assert outcome.code == 0, outcome.err
        assert f"{hub.address}/me/model/commit/1" in outcome.out.replace("\n", "")
        assert hub.private["me/model"] and hub.files["me/model"].keys() >= {
            "config.json",
            "model.safetensors",
        }
        again = longspan("export model --push me/model --out again")
        assert again.code == 2 and "--overwrite" in again.err and not Path("again").exists()
        assert TOKEN not in outcome.out + outcome.err + again.err + Path("out/settings.yaml").read_text()


def test_factors_longer_than_a_name_may_be(longspan, model):
    """LongRoPE's factors in an option ended in a traceback: they were looked for as a file."""
    factors = ",".join(["1.0"] * 8)
    rope = f"{{rope_type: longrope, factor: 2.0, original_max_position_embeddings: 512, {' ' * 300}"
    rope += f"short_factor: [{factors}], long_factor: [{factors}]}}"
    outcome = longspan(["export", "model", "--rope", rope, "--max-length", "1k", "--out", "out"])
    assert outcome.code == 0, outcome.err
    assert json.loads(Path("out/config.json").read_text())["rope_parameters"]["factor"] == 2.0
