"""`longspan plan` without torch: names, folders, recipes, and what is said when nothing fits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from longspan.core.config import read_yaml
from longspan.train.config import TrainConfig
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
STAGE = """\
stages:
  - {name: one, context_length: 256, batch_tokens: 512, steps: 1, lr: 1e-3, streams: {text: {rows: not-there}}}
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


def test_the_longest_context_is_where_fitting_ends(longspan, tmp_path) -> None:
    """A longest context that does not fit, or a step above which another still does."""
    found = json.loads(
        longspan(["plan", "llama-3-8b", "--max-context", "--gpus", "rtx-4090", "--qlora", "8", "--json"]).out
    )
    longest = found["context_length"]
    assert found["arrangements"][0]["fits"] and longest % 4096 == 0
    further = str(longest + max(4096, longest // 32))
    beyond = ["plan", "llama-3-8b", "--context", further, "--gpus", "rtx-4090", "--qlora", "8"]
    assert not json.loads(longspan([*beyond, "--json"]).out)["arrangements"][0]["fits"]
    outcome = longspan(["plan", "llama-3-70b", "--max-context", "--gpus", "l4"])
    assert outcome.code == 2 and "do not fit" in outcome.err


def test_money_and_formulas(longspan) -> None:
    """A cost of one GPU for eight, and a formula that shows other numbers than the estimate."""
    options = [
        "plan",
        "llama-3-8b",
        "--context",
        "128k",
        "--gpus",
        "8xh100",
        "--price",
        "2",
        "--budget",
        "100",
    ]
    best = json.loads(longspan([*options, "--json"]).out)["arrangements"][0]
    of_token = 8 * 2 / 3600 / best["tokens_per_second"]
    assert best["cost_of_a_billion_tokens"] == pytest.approx(of_token * 1e9)
    assert best["tokens_for_the_budget"] == pytest.approx(100 / of_token)
    out = longspan([*options, "--explain", "--kernel", "fa2"]).out
    assert "8,030,261,248" in out and "with fa2" in out and "UPipe" in out
    for wrong in (
        ["--context", "8k", "--max-context"], [], ["--context", "8k", "--budget", "3"],
        ["--context", "8k", "--kernel", "fa9"],
        ["--mode", "infer", "--max-context"], ["--mode", "infer", "--context", "8k", "--lora", "8"],
    ):  # fmt: skip
        assert longspan(["plan", "llama-3-8b", "--gpus", "h100", *wrong]).code == 2, wrong


def test_answering_by_hand(longspan) -> None:
    """Llama-3-8B in bf16: 16.06 GB of weights and 128 KiB of keys and values a token, read once for each token."""
    options = ["plan", "llama-3-8b", "--mode", "infer", "--context", "128k", "--gpus"]
    found = json.loads(longspan([*options, "h100", "--json"]).out)
    assert found["parts"]["weights"] == 8_030_261_248 * 2
    assert found["parts"]["keys and values"] == 2**17 * 128 * 1024
    read = found["active_parameters"] * 2 + 2**34
    assert found["tokens_per_second"] == pytest.approx(3.35e12 * 0.6 / read)
    assert found["fits"] and "tokens/s" in longspan([*options, "2xl40s"]).out
    assert "does not fit" in longspan([*options, "l4"]).out


def test_a_written_recipe_is_one(longspan, tmp_path) -> None:
    """A recipe that `longspan train` refuses."""
    for name, more in (("full.yaml", []), ("qlora.yaml", ["--qlora", "8"])):
        path = tmp_path / name
        options = [
            "plan",
            "llama-3-8b",
            "--context",
            "256k",
            "--gpus",
            "8xh100",
            "--write",
            str(path),
            *more,
            "--json",
        ]
        best = json.loads(longspan(options).out)["arrangements"][0]
        config = TrainConfig.from_dict(read_yaml(path))
        assert config.parallel.cp_ring == best["parallel"]["cp_ring"] and config.parallel.world == 8
        assert {name: getattr(config.memory, name) for name in best["memory"]} == best["memory"]
        assert config.stages[0].context_length == 2**18
    assert config.lora is not None and config.lora.quantize == "nf4"


def test_gpus_of_ones_own(longspan) -> None:
    """Figures that are left out taken for zero, or a name that is misread."""
    options = ["plan", "llama-3-8b", "--context", "8k", "--json", "--gpus"]
    own = json.loads(longspan([*options, "8x{like: h100, memory: 200e9}"]).out)
    assert own["gpu"] == "own (h100)" and own["num_gpus"] == 8
    assert json.loads(longspan([*options, "4x2xl40s"]).out)["num_gpus"] == 8
    for wrong in (
        "8x{like: h99}",
        "8x{memory: 3}",
        "2x{like: h100, memory: -1}",
        "{like: [}",
        "2x{like: h100, speed: 3}",
    ):
        assert longspan([*options, wrong]).code == 2, wrong


def test_a_recipe_is_probed_and_planned(longspan, tmp_path) -> None:
    """Rows of the data, which need not be there, and a plan with other rates than those that are shown."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + STAGE)
    found = json.loads(longspan(["plan", str(recipe), "--context", "512", "--probe", "--json"]).out)
    assert [row["tokens"] for row in found["probe"]] == [128, 256]
    assert all(row["seconds"] > 0 and row["bytes"] > row["kept"] for row in found["probe"])
    assert found["gpu"] == "cpu" and len(found["scaled"]) == 3
    best = found["arrangements"][0]
    assert sum(best["device_parts"].values()) == pytest.approx(best["device_bytes"])
    for wrong in (
        [str(recipe), "--gpus", "8xh100"], [str(recipe), "--lora", "4"], ["llama-3-8b"],
        [str(recipe), "--mode", "infer"],
    ):  # fmt: skip
        outcome = longspan(["plan", *wrong, "--context", "512", "--probe"])
        assert outcome.code == 2 and "probe" in outcome.err, wrong
