"""However a model is run, it says the same: in this process, in several, and behind a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.data.tokenizer import load_tokenizer, train_bpe
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.needle import NeedleTask
from longspan.eval.needle_config import NeedleConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.records import read_records
from tests.cli.conftest import Command
from tests.infer.served import transformers_serving

GRID: dict[str, Any] = {
    "lengths": [80, 112],
    "depths": [0.0, 0.5, 1.0],
    "answer_digits": 2,
    "keys": ["amber", "copper"],
}
COMMAND = (
    "eval needle --model model --data texts --out run --lengths 80,112 --depths 0,0.5,1 --digits 2 --samples 4 "
    "--key amber --key copper"
)
WORDS = [
    "stone",
    "river",
    "lamp",
    "window",
    "garden",
    "silver",
    "paper",
    "bridge",
    "winter",
    "candle",
    "music",
]
STEPS = 350


def write_texts(folder: Path) -> list[HeldOutDocument]:
    """Write texts without a number in them; return them."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        lines = [" ".join(generator.choice(WORDS, 7)).capitalize() + "." for _ in range(60)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return [HeldOutDocument(path.name, path.read_text()) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, which was taught for some seconds to say the only number in a text, and `texts`."""
    root = tmp_path_factory.mktemp("same")
    documents = write_texts(root / "texts")
    needle = "The magic number of amber is 1234567890.\nThe magic number of copper is 1.\n"
    train_bpe([document.text + needle for document in documents], root / "model", vocab_size=330)
    tokenizer = load_tokenizer(root / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = LlamaForCausalLM(config)
    # Other keys and numbers than those that are asked for: another seed.
    settings = NeedleConfig.from_dict({**GRID, "samples": 150, "seed": 1})
    task = NeedleTask(settings, documents, PromptForm(tokenizer))
    requests = [task.build(planned).request for planned in task.plan()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        chosen = [requests[index] for index in generator.choice(len(requests), 16)]
        ids = torch.zeros(16, 112, dtype=torch.long)
        labels = torch.full((16, 112), -100)
        for row, request in enumerate(chosen):
            whole = torch.from_numpy(np.concatenate([request.prompt_ids, request.answer_ids]))
            ids[row, : len(whole)] = whole
            labels[row, len(request.prompt_ids) : len(whole)] = torch.from_numpy(request.answer_ids)
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "model")
    return root


def samples_of(run: Path, label: str) -> dict[tuple[int, float, int], dict[str, Any]]:
    found = read_records(run / "records" / f"needle-{label}.jsonl").samples
    return {(sample["length"], sample["depth"], sample["sample"]): sample for sample in found}


@pytest.mark.slow
def test_every_way_of_running_a_model_gives_its_answers(
    folder: Path, longspan: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generated answer matches in full where the most likely token is right at every position, and only there."""
    monkeypatch.chdir(folder)
    assert longspan(f"{COMMAND} --label forced").code == 0
    forced = samples_of(folder / "run", "forced")
    (answer_tokens,) = {sample["answer_tokens"] for sample in forced.values()}
    generate = f"{COMMAND} --mode generate --scorer exact_match --max-new-tokens {answer_tokens}"
    with transformers_serving(folder / "model", log=folder / "serve.log") as address:
        ways = {
            "here": "",
            "plain": "--no-prefix-reuse",
            "tp": "--tp 2",
            "cp": "--cp 2",
            "replicas": "--replicas 2",
            "served": f"--model completions:{folder / 'model'} --tokenizer model --base-url {address}",
        }
        for label, options in ways.items():
            outcome = longspan(f"{generate} --label {label} {options}")
            assert outcome.code == 0, outcome.err
    for label in ways:
        generated = samples_of(folder / "run", label)
        assert len(generated) == len(forced) == 24
        for cell, sample in generated.items():
            assert sample["prompt_sha256"] == forced[cell]["prompt_sha256"]
            assert sample["score"] == forced[cell]["score"], (label, cell)
            assert sample["output"] == samples_of(folder / "run", "here")[cell]["output"], (label, cell)
    # Guard against passing because nothing, or everything, is right.
    assert 3 <= sum(sample["score"] for sample in forced.values()) <= 23
    for label, options in {"forced_tp": "--tp 2", "forced_cp": "--cp 2"}.items():
        assert longspan(f"{COMMAND} --label {label} {options}").code == 0
        for cell, sample in samples_of(folder / "run", label).items():
            assert (sample["output"], sample["score"]) == (forced[cell]["output"], forced[cell]["score"])
            assert sample["answer_nll"] == pytest.approx(forced[cell]["answer_nll"], rel=1e-4, abs=1e-5)
