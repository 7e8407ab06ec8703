"""`longspan plan` without torch: names, folders, recipes, and what is said when nothing fits."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from longspan.core.config import read_yaml
from longspan.train.config import TrainConfig
from tests.patience import PATIENCE_SECONDS

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
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
    (tmp_path / "models" / "small" / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
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
        ["--mode", "infer", "--context", "8k", "--write", "r.yaml"], ["--context", "8k", "--kv-dtype", "fp8"],
        ["--mode", "infer", "--context", "8k", "--lora", "8"], ["--mode", "infer", "--context", "8k", "--price", "2"],
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


def test_answering_on_several_gpus(longspan) -> None:
    """Heads of keys cut into pieces where GPUs are more than they, and sums over GPUs that take no time."""
    options = ["plan", "llama-3-8b", "--mode", "infer", "--json", "--context", "128k", "--gpus"]

    def found(gpus: str, *more: str) -> dict[str, Any]:
        return json.loads(longspan([*options, gpus, *more]).out)

    cache = {num: found(f"{num}xh100")["parts"]["keys and values"] for num in (1, 8, 16)}
    assert cache[1] == 8 * cache[8] == 8 * cache[16]
    assert found("h100", "--kv-dtype", "fp8")["parts"]["keys and values"] == cache[1] / 2
    assert found("h100", "--kv-dtype", "q8_0")["parts"]["keys and values"] == cache[1] / 2 * 34 / 32
    fast, slow = found("8xl40s"), found("8x{like: l40s, nvlink: 1e9}")
    # 64 sums of a prompt of 128K x 4,096 in bf16, sent 2 * 7/8 times.
    sent = 64 * 2 * 7 / 8 * 2**17 * 4096 * 2 / 0.8
    waited = slow["prefill_seconds"] - fast["prefill_seconds"]
    assert waited == pytest.approx(sent / 1e9 - sent / 12.5e9, rel=0.01)
    assert longspan([*options, "3xh100"]).code == 2
    longest = json.loads(longspan([*options[:5], "--max-context", "--gpus", "h100"]).out)
    assert longest["fits"] and longest["device"] > 0.95 * 80e9


def test_a_recipe_says_how_it_trains(longspan, tmp_path) -> None:
    """A recipe with adapters planned as if all weights were trained, and overrides of its config left out."""
    recipe = tmp_path / "recipe.yaml"
    stages = STAGE.replace("context_length: 256", "context_length: 8k").replace(
        "batch_tokens: 512", "batch_tokens: 65536"
    )
    recipe.write_text(
        "model: {path: Qwen/Qwen3-4B}\nlora: {rank: 8, target_modules: [q_proj, v_proj], quantize: nf4}\n"
        + stages
    )
    written = tmp_path / "new" / "plan.yaml"
    written.parent.mkdir()
    options = ["--gpus", "rtx-4090", "--json"]
    of_recipe = json.loads(longspan(["plan", str(recipe), *options, "--write", str(written)]).out)
    whole = json.loads(
        longspan(["plan", "qwen3-4b", "--context", "8k", "--batch-tokens", "65536", *options]).out
    )
    assert of_recipe["context_length"] == 8192
    best, other = of_recipe["arrangements"][0], whole["arrangements"][0]
    assert best["tokens_per_step"] == 65536
    assert best["fits"] and best["host_bytes"] < other["host_bytes"]
    config = TrainConfig.from_dict(read_yaml(written))
    assert config.model.path == "Qwen/Qwen3-4B" and config.lora is not None
    assert config.lora.target_modules == ("q_proj", "v_proj") and config.lora.quantize == "nf4"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    recipe.write_text("model: {path: ., config_overrides: {num_hidden_layers: 6}}\n")
    options = ["--gpus", "h100", "--context", "4k", "--json"]
    deep = json.loads(longspan(["plan", str(recipe), *options]).out)["parameters"]
    assert deep > json.loads(longspan(["plan", str(tmp_path), *options]).out)["parameters"]
    for wrong in ("model: 3", "model: {path: [1]}", "model: {path: ., hf_config: {}}", "model: {hf_config: {}}",
                  "model: {path: .}\nlora: [1]", "model: {path: .}\nlora: {rank: x}",
                  "model: {path: .}\nstages: 3", "model: {path: .}\nstages: [{context_length: [1]}]",
                  "model: {path: ., config_overrides: {layers: 3}}"):  # fmt: skip
        recipe.write_text(wrong + "\n")
        assert longspan(["plan", str(recipe), "--gpus", "h100"]).code == 2, wrong
    recipe.write_text("model: {path: Qwen/Qwen3-4B, config_overrides: {num_hidden_layers: 4}}\n")
    assert "config_overrides" in longspan(["plan", str(recipe), *options]).err
    assert (
        json.loads(longspan(["plan", "prolong-64k", "--gpus", "8xh100", "--json"]).out)["context_length"]
        == 65536
    )


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


@pytest.mark.parametrize(
    "wrong",
    [["--context", "x"], ["--context", "0"], ["--context", "4k", "--max-context"], ["--batch-tokens", "x"]],
)
def test_what_is_wrong_is_refused_before_a_probe_runs(longspan, tmp_path, monkeypatch, wrong) -> None:
    """Minutes of steps on this machine, and then the word that a length is none."""
    ran: list[object] = []
    monkeypatch.setattr("longspan.train.probe.probe", lambda *given: ran.append(given))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + STAGE)
    assert longspan(["plan", str(recipe), "--probe", *wrong]).code == 2 and not ran


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
        [str(recipe), "--mode", "infer"], [str(recipe), "--kernel", "fa2"],
    ):  # fmt: skip
        outcome = longspan(["plan", *wrong, "--context", "512", "--probe"])
        assert outcome.code == 2 and "probe" in outcome.err, wrong
