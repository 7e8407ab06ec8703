"""The benchmark of training runs: tiny sizes on CPU, what its tables judge, and what it says of a GPU's figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="pins processes to cores, which only Linux does"
)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "train.py"), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_our_side_runs_on_tiny_sizes(tmp_path: Path) -> None:
    """A recipe or signature that changed under the benchmark, noticed only when somebody measures again."""
    done = bench("--dry-run", "--only", "speed", "--work", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (part,) = json.loads((tmp_path / "results.json").read_text())["speed"]
    (row,) = part["turns"]
    assert len(row["losses"]) == 3 and len(row["wall_s"]) == 2
    assert row["losses"][-1] < row["losses"][0]
    assert "| longspan | 2 rows at a time | 1 |" in done.stdout
    assert row["peak_mib"] <= row["run_peak_mib"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("accelerate") is None, reason="the Hugging Face Trainer needs accelerate")
def test_the_hugging_face_trainer_has_the_same_losses(tmp_path: Path) -> None:
    """A peer told another optimizer, order or division of the loss would be no peer. TRL may be missing here."""
    done = bench("--dry-run", "--peers", sys.executable, "--work", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [*results["speed"][0]["scouts"], *results["memory"]]
    theirs = [row for row in rows if row["tool"] == "transformers"]
    assert len(theirs) == 8 and all(row["difference"] < 1e-5 for row in theirs), theirs
    failed = {row["tool"] for row in rows if "error" in row}
    assert failed == (set() if find_spec("trl") else {"trl"})


@pytest.mark.slow
def test_sections_for_a_gpu_run_on_cpu(tmp_path: Path) -> None:
    """The one run on a GPU must not be spent on a signature that changed. Errors are rows, losses agree."""
    out = tmp_path / "gpu.json"
    done = bench("--gpu", "--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    failed = {(row["method"], row["error"]) for row in rows if "error" in row}
    optional = {"liger_kernel", "peft", "bitsandbytes"}
    assert all(any(name in error for name in optional) for _, error in failed), failed
    steps = [row for row in rows if row["section"] == "step" and "loss" in row]
    assert {"longspan", "transformers, SDPA flash, all logits"} <= {row["method"] for row in steps}
    assert max(row["loss"] for row in steps) - min(row["loss"] for row in steps) < 1e-5
    # With chunks and without, the second step of the same weights has the same loss.
    long = {(row["method"], row["layers"], row["tokens"]): row["loss"] for row in rows if "seconds" in row}
    for layers, tokens in ((1, 64), (1, 128), (3, 64), (3, 128)):
        whole = long["full, offloaded", layers, tokens]
        assert abs(long["chunk-recurrent, offloaded", layers, tokens] - whole) < 1e-5


def test_flops_are_those_of_llama_3_8b(modules: None) -> None:
    """MFU twice as high because attention counts the hidden half too."""
    from gpu_measure import FULL
    from train_gpu import model_flops

    total, attention = model_flops(FULL, 32, 8192)
    # 8.03B weights less the 0.525B of the input embedding, which multiplies nothing.
    assert (total - attention) / (6 * 8192) == pytest.approx(7.505e9, rel=1e-3)
    assert attention == 6 * 32 * 4096 * 8192**2


def test_extrapolation_finds_the_curve_again(modules: None) -> None:
    """Columns of the fit that differ by ten orders of magnitude, solved into noise."""
    from gpu_measure import FULL
    from train_gpu import extrapolate

    def row(layers: int, tokens: int) -> dict[str, Any]:
        return {
            "layers": layers,
            "tokens": tokens,
            "peak_mib": 1000 + 50 * layers + 0.01 * tokens + 0.001 * layers * tokens,
            "seconds": layers * (3e-11 * tokens**2 + 2e-6 * tokens) + 4e-6 * tokens,
        }

    rows = [row(layers, tokens) for layers in (1, 3) for tokens in (65536, 131072)]
    found = extrapolate(FULL, rows, memory_mib=1000 + 50 * 32 + 0.042 * 500_000)
    assert found["tokens"] == pytest.approx(500_000, abs=2)
    assert found["record_peak_mib"] == pytest.approx(row(32, 1_200_000)["peak_mib"])
    assert found["record_minutes"] * 60 == pytest.approx(row(32, 1_200_000)["seconds"])


def test_tables_judge_by_the_losses(modules: None) -> None:
    """A peer that is fast because it computes something else must not become the one to beat, nor pass in silence."""
    from train import _counts, different
    from train_tables import render

    def row(tool: str, name: str, rate: float, difference: float, same: bool = True) -> dict[str, Any]:
        rates = {"tokens_per_wall_s": rate, "tokens_per_cpu_s": rate}
        memory = {"peak_mib": 100.0 + rate, "imports_mib": 100.0, "run_peak_mib": 900.0}
        numbers = {"difference": difference, "losses": [1.0], "same_steps": same}
        return {"tool": tool, "name": name, **rates, **memory, **numbers}

    ours, padded = row("longspan", "rows", 300.0, 0.0), row("transformers", "padded", 150.0, 2e-7)
    wrong, wrapped = row("transformers", "wrong", 900.0, 2e-3), row("trl", "wrapped", 900.0, 2e-3, False)
    slow = {"tool": "trl", "name": "slow", "same_steps": True, "error": "Killed"}
    assert [_counts(each) for each in (ours, padded, wrong, wrapped, slow)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    speed = {
        "model": "m",
        "lengths": "mixed",
        "scouts": [ours, wrong, wrapped, slow],
        "turns": [ours, padded],
    }
    results = {
        "machine": {"processor": "p", "cores": 2, "python": "3", "load_average": [0, 0, 0]},
        "threads": 1,
        "speed": [speed],
        "memory": [ours, padded],
    }
    text = render(results)
    assert "| transformers | padded | 1 | 150 | 150 | 2.00 | 2.00 | met | 2e-07 |" in text
    assert "| transformers | wrong | 900 | 900 | 1,000 | 2e-03 | NO |" in text
    assert "| trl | wrapped | 900 | 900 | 1,000 | 2e-03 | no |" in text
    assert "| trl | slow |  |  |  |  | Killed |" in text
    assert "| transformers | padded | 250 | 100 | 900 | 0.6 |" in text
    assert different(results) == ["transformers, wrong: losses differ by 2.0e-03"]


def test_unknown_part_is_named() -> None:
    """A misspelt part that runs nothing and looks like success."""
    done = bench("--only", "speed,memry")
    assert done.returncode == 2
    assert "no such part: memry" in done.stderr
