"""The benchmark of evaluation: every part on tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from longspan.infer.local import LocalAnswerer
from longspan.models.hf import build_model, load_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_part_runs_on_tiny_sizes(tmp_path: Path) -> None:
    """A task or signature that changed under the benchmark, noticed only when somebody measures again."""
    command = [sys.executable, str(BENCHMARKS / "eval.py"), "--dry-run", "--out", str(tmp_path / "out.json")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    grid, multi_key = results["grid"][0], results["multi_key"][0]
    # Two lengths by three depths over one haystack; three questions on one context.
    assert (grid["cells"], multi_key["cells"]) == (6, 3)
    for row in (grid, multi_key):
        assert row["read"] < row["tokens"]
        assert 0.95 < row["read"] / row["bound"] < 1.05
        assert row["agreeing"] == row["cells"]
    assert [row["prompts"] for row in results["published"]] == [440, 400]
    assert (
        set(results["ruler"]["cold"]) == set(results["ruler"]["warm"]) and len(results["ruler"]["cold"]) == 13
    )
    assert "| easycontext | 440 |" in done.stdout


def test_short_prompts_are_answered_as_by_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sides that are not asked the same, or a benchmark that no longer runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import eval_decode

    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    build_model(
        {**eval_decode.MODEL, **tiny, "num_key_value_heads": 1, "vocab_size": 64, "initializer_range": 0.3},
        seed=0,
    ).save_pretrained(tmp_path)
    model, peer = load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    peer.generation_config = type(peer.generation_config)()
    answerer = LocalAnswerer(model, eval_decode.NoText(), identity={}, batch_tokens=64)
    row = eval_decode.measure(answerer, peer, eval_decode.Workload(4, (2, 9), (2, 5)), 1)
    assert row["equal"] == 4
    assert set(row["cpu_s"]) == {"longspan", "transformers", "longspan decoding", "transformers decoding"}
