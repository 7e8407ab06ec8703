"""Published adapters, by folder and by hub name: asked, measured and exported with the RoPE that they need."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.data.tokenizer import train_bpe
from longspan.infer.config import AnswererConfig
from longspan.models.hf import build_model, load_model, save_model
from longspan.steps.opening import find_tokenizer
from tests.hub_cache import publish, use_cache

THETA = 2e8
KNOWN = "namespace-Pt/Llama-3-8B-Instruct-80K-QLoRA"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "rope_theta": 5e5,
}


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Let peft ask transformers by a name that will be removed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ with its tokenizer, adapter/ as peft writes it, and hub/ with both as org/base and org/adapter."""
    root = tmp_path_factory.mktemp("adapters")
    save_model(build_model(LLAMA, seed=0), root / "base", tokenizer=corpus / "tokenizer")
    generation = {"eos_token_id": 2, "max_length": 64}
    (root / "base" / "generation_config.json").write_text(json.dumps(generation))
    (root / "base" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    with quiet_peft():
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    with quiet_peft():
        model.save_pretrained(root / "adapter")
    shutil.copytree(root / "adapter", root / "published")
    settings = json.loads((root / "adapter" / "adapter_config.json").read_text())
    named = json.dumps(settings | {"base_model_name_or_path": "org/base"})
    (root / "published" / "adapter_config.json").write_text(named)
    publish(root / "base", root / "hub", "org/base")
    for name in ("org/adapter", KNOWN):
        publish(root / "published", root / "hub", name)
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_cache(monkeypatch, made / "hub")
    monkeypatch.chdir(tmp_path)
    for name in ("base", "adapter"):
        (tmp_path / name).symlink_to(made / name)
    return made


def merged(made: Path, theta: float) -> torch.nn.Module:
    """What peft makes of base and adapter."""
    config = AutoConfig.from_pretrained(made / "base")
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    config.max_position_embeddings = 256
    base = AutoModelForCausalLM.from_pretrained(made / "base", config=config)
    with quiet_peft():
        return peft.PeftModel.from_pretrained(base, made / "adapter").merge_and_unload().eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 205)[None]).logits


@pytest.mark.parametrize("name", ["adapter", "org/adapter"])
def test_asked_with_another_theta_as_peft_answers(longspan, here, name):
    """A folder without config.json was no model, a hub name no adapter, and the base's tokenizer was not looked for."""
    question = " ".join(["Who built the bridge?"] * 12)
    words = find_tokenizer(AnswererConfig(model="base"))
    ids = torch.from_numpy(words.encode(question).astype("int64"))[None]
    outcome = longspan(
        ["ask", name, "--rope-theta", "200e6", "--question", question, "--max-new-tokens", "12", "--json"]
    )
    assert outcome.code == 0, outcome.err
    answers = {
        theta: merged(here, theta).generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        for theta in (THETA, 5e5)
    }
    texts = {theta: words.decode(found[ids.shape[1] :].tolist()) for theta, found in answers.items()}
    assert texts[THETA] != texts[5e5], "a test that theta does not matter in"
    found = json.loads(outcome.out)
    assert found["prompt_tokens"] == ids.shape[1] and found["answer"].strip() == texts[THETA].strip()
    base = "org/base" if name.startswith("org/") else str(here / "base")
    assert f"{name} has no tokenizer: that of its base {base} is used" in outcome.err


def test_measured_by_hub_name(longspan, here):
    Path("held.jsonl").write_text(json.dumps({"text": "A long and quiet river runs. " * 30}) + "\n")
    line = "eval ppl --data held.jsonl --lengths 128 --num-documents 1 --truncate --out out --json"
    by_name = longspan(f"{line} --model org/adapter --rope-theta 200e6")
    by_folder = longspan(f"{line} --model adapter --label folder --rope-theta 200e6")
    assert by_name.code == by_folder.code == 0, by_name.err + by_folder.err
    losses = [
        [json.loads(row)["values"] for row in file.read_text().splitlines() if '"values"' in row]
        for file in sorted(Path("out/records").glob("*.jsonl"))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["adapter", "org/adapter"])
def test_exported_with_the_theta_of_its_evaluation(longspan, here, name):
    """The merged folder said the base's theta and length, so that everyone after had to know better."""
    outcome = longspan(f"export {name} --rope-theta 200e6 --max-length 256 --out out")
    assert outcome.code == 0, outcome.err
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained("out")), logits(merged(here, THETA)), atol=1e-4
    )
    config = json.loads(Path("out/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    assert config["max_position_embeddings"] == 256
    assert json.loads(Path("out/generation_config.json").read_text())["max_length"] == 256
    assert json.loads(Path("out/tokenizer_config.json").read_text())["model_max_length"] == 256
    assert Path("out/tokenizer.json").is_file()


def test_a_whole_model_is_exported_with_another_rope(longspan, here):
    """By name and by folder; a plain RoPE and one that other readers take from `rope_scaling`."""
    rope = "{rope_type: linear, factor: 4}"
    for name, out in (("base", "folder"), ("org/base", "name")):
        outcome = longspan(["export", name, "--rope", rope, "--max-length", "256", "--out", out])
        assert outcome.code == 0, outcome.err
    config = json.loads(Path("name/config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0} and config["rope_theta"] == 5e5
    assert Path("name/config.json").read_bytes() == Path("folder/config.json").read_bytes()
    assert load_model("name").config.rope_parameters["factor"] == 4.0


def test_the_published_adapter_gets_its_theta_unasked(longspan, here):
    """Its folder says nothing of the theta it was trained with, which only its authors' command line does."""
    outcome = longspan(f"export {KNOWN} --out out")
    assert outcome.code == 0 and "--rope_theta 200e6" in outcome.err and "does not say" not in outcome.out
    assert load_model("out").config.rope_parameters["rope_theta"] == THETA
    assert load_model(KNOWN, rope={"rope_type": "default"}).config.rope_parameters["rope_theta"] == 5e5


def test_a_teacher_by_hub_name_has_its_tokenizer_checked(longspan, here, corpus):
    """The data's tokenizer was compared with that of a folder alone: a name's could be any."""
    Path("held.jsonl").write_text(json.dumps({"text": "A long and quiet river runs."}) + "\n")
    train_bpe(["quite another tokenizer"], "other", vocab_size=300)
    for name, words in (("same", corpus / "tokenizer"), ("another", Path("other"))):
        assert longspan(f"data tokenize held.jsonl --tokenizer {words} --out {name}").code == 0
    line = "annotate topk --model org/adapter --rope '{rope_type: default, rope_theta: 2e8}' --k 4"
    outcome = longspan(f"{line} --data same --out taught")
    assert outcome.code == 0, outcome.err
    assert "another tokenizer than the teacher's" in longspan(f"{line} --data another --out refused").err


def test_an_adapter_alone_keeps_the_theta_it_was_given(longspan, here):
    assert longspan("export adapter --adapter --rope-theta 200e6 --max-length 256 --out out").code == 0
    model = load_model("out")
    assert model.config.rope_parameters["rope_theta"] == THETA and model.config.max_position_embeddings == 256


def test_what_the_adapter_does_not_say_is_noted(longspan, here):
    outcome = longspan("export adapter --out out")
    assert "does not say which RoPE it was trained with" in outcome.out and "500000" in outcome.out


def test_what_cannot_be_written_is_refused_before_work(longspan, here):
    dynamic = "{rope_type: dynamic, factor: 4}"
    for arguments, parts in (
        (["base", "--max-length", "32"], ["only raises", "64"]),
        (["base", "--rope", dynamic, "--max-length", "256"], ["only raises", "64"]),
        (["adapter", "--rope", "{rope_theta: 1e6}", "--rope-theta", "2e6"], ["given twice"]),
        (["org/absent"], ["cannot load a model from org/absent"]),
    ):
        outcome = longspan(["export", *arguments, "--out", "out"])
        assert outcome.code == 2 and "Traceback" not in outcome.err, arguments
        assert all(part in outcome.err for part in parts), outcome.err
    assert not Path("out").exists()


def test_old_weights_are_read_and_bad_ones_one_message(longspan, here):
    """Adapters from before safetensors were refused; one that runs code when it is read must stay refused."""
    from safetensors.torch import load_file

    for name in ("old", "evil"):
        shutil.copytree(here / "adapter", name)
        tensors = load_file(f"{name}/adapter_model.safetensors")
        Path(name, "adapter_model.safetensors").unlink()
        torch.save(tensors if name == "old" else {"x": Path("a")}, f"{name}/adapter_model.bin")
    assert torch.equal(logits(load_model("old")), logits(load_model(here / "adapter")))
    outcome = longspan("export evil --out out")
    assert outcome.code == 2 and "adapter_model.bin cannot be read" in outcome.err
