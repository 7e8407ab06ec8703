"""`longspan plan` without torch: names, folders, recipes, and what is said when nothing fits."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.patience import PATIENCE_SECONDS

RECIPE = """\
model:
  hf_config:
    model_type: llama
    vocab_size: 512
    hidden_size: 64
    intermediate_size: 128
    num_hidden_layers: 2
    num_attention_heads: 2
"""


def test_without_torch() -> None:
    """A planner is asked on a laptop: importing torch there would make it fail or wait."""
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    code += "sys.argv = 'longspan plan llama-3-8b --context 512k --gpus 8xh100 --json'.split()\n"
    code += "from longspan.cli.main import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    best = found["arrangements"][0]
    assert found["context_length"] == 2**19 and best["fits"]
    assert sum(best["device_parts"].values()) == best["device_bytes"] <= 80e9
    assert best["parallel"]["cp_ring"] * best["parallel"]["cp_ulysses"] * best["parallel"]["dp_shard"] == 8


def test_recipes_and_folders(longspan, tmp_path) -> None:
    """A recipe holds a configuration, or the path of a folder with one, relative to its data root."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    options = ["--context", "4k", "--gpus", "h100", "--json"]
    made = json.loads(longspan(["plan", str(tmp_path / "recipe.yaml"), *options]).out)
    (tmp_path / "models" / "small").mkdir(parents=True)
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    (tmp_path / "models" / "small" / "config.json").write_text(json.dumps(config))
    (tmp_path / "path.yaml").write_text("data_root: models\nmodel: {path: small}\n")
    for model in ("path.yaml", "models/small"):
        found = json.loads(longspan(["plan", str(tmp_path / model), *options]).out)
        assert found["arrangements"] == made["arrangements"] and found["parameters"] == made["parameters"]
    (tmp_path / "hub.yaml").write_text("model: {path: meta-llama/Llama-2-7b-hf}\n")
    assert json.loads(longspan(["plan", str(tmp_path / "hub.yaml"), *options]).out)["model"] == "llama-2-7b"


def test_what_is_missing_is_said(longspan, tmp_path) -> None:
    """A plan that does not fit is an answer; a wrong argument is a mistake."""
    outcome = longspan(["plan", "llama-3-70b", "--context", "8M", "--gpus", "8xa100"])
    assert outcome.code == 0 and "lacks" in outcome.out and "take more GPUs" in outcome.out
    (tmp_path / "empty.yaml").write_text("seed: 1\n")
    for arguments in (
        ["plan", "llama-3-8b", "--context", "0", "--gpus", "h100"],
        ["plan", "llama-3-8b", "--context", "8k", "--gpus", "h100", "--lora", "8", "--qlora", "8"],
        ["plan", str(tmp_path / "empty.yaml"), "--context", "8k", "--gpus", "h100"],
        ["plan", str(tmp_path / "none.yaml"), "--context", "8k", "--gpus", "h100"],
    ):
        assert longspan(arguments).code == 2, arguments
