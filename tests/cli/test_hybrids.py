"""A saved model whose layers carry a state, asked by every kind of command; it has no RoPE either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longspan.data.tokenizer import load_tokenizer
from tests.hybrids import eager


@pytest.fixture
def hybrid(store: Path) -> Path:
    """A random Nemotron-H in `hybrid`, with the tokenizer of the store."""
    folder, tokenizer = store.parent / "hybrid", store.parent / "tokenizer"
    model = eager("nemotron_h", vocab_size=load_tokenizer(tokenizer).vocab_size, max_position_embeddings=4096)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    return folder


def test_every_command_asks_it(longspan, hybrid):
    """Records name a RoPE, which it has none of; a grid read once and cell by cell is the same grid."""
    grid = "eval needle --model hybrid --out run --lengths 256,320 --depths 0:1:3 --samples 1 --json"
    once = longspan(grid)
    assert once.code == 0, once.err
    plain = longspan(f"{grid} --label plain --no-prefix-reuse")
    assert json.loads(plain.out)["cells"] == json.loads(once.out)["cells"]
    ppl = longspan("eval ppl --model hybrid --out run --data store --lengths 64,128 --num-documents 2 --json")
    assert ppl.code == 0, ppl.err
    assert [row["length"] for row in json.loads(ppl.out)["by_length"]] == [64, 128]
    asked = longspan("ask hybrid --question Hello --max-new-tokens 2 --json")
    assert asked.code == 0 and json.loads(asked.out)["answer_tokens"] == 2, asked.err


RECIPE = """\
model: {{path: {model}, dtype: float32}}
tokenizer: tokenizer
checkpoint: {{every_steps: 2, keep: 4}}
memory: {{activation_checkpointing: full}}
stages:
  - name: long
    context_length: 256
    tokens: 2048
    batch_tokens: 512
    lr: 1e-2
    streams:
      text: {{store: store}}
"""


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next"])
def test_a_run_is_stopped_goes_on_and_is_exported(longspan, store: Path, family: str):
    """State layers whose tensors a checkpoint, a stage or an export leaves out, or whose packed rows differ."""
    words = load_tokenizer(store.parent / "tokenizer").vocab_size
    eager(family, vocab_size=words, max_position_embeddings=512).save_pretrained(family)
    Path("recipe.yaml").write_text(RECIPE.format(model=family))
    outcome = longspan("train recipe.yaml --out whole")
    assert outcome.code == 0, outcome.err
    shutil.copytree("whole", "stopped")
    for later in ("COMPLETE", "stages", "checkpoints/step-00000004"):
        path = Path("stopped", later)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert longspan("train recipe.yaml --out stopped").code == 0
    weights = [Path(run, "stages", "long", "model.safetensors") for run in ("whole", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].read_bytes() != Path(family, "model.safetensors").read_bytes()
    assert longspan("export whole --out exported").code == 0
    ids = torch.arange(3, 43)[None]
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in ("exported", weights[0].parent)]
    with torch.no_grad():
        first, second = (model(ids, use_cache=False).logits for model in models)
    torch.testing.assert_close(first, second)
    ppl = longspan("eval ppl --model exported --out run --data store --lengths 64 --num-documents 2")
    assert ppl.code == 0, ppl.err
