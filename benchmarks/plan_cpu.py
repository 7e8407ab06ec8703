"""A plan for this machine's CPU beside steps that are really run on it: time and memory, before and after a probe.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_cpu

Each case is a process of its own: what a heap gave back before is not there for the next. Seconds are the process's
CPU seconds, of a planner and a step alike, so that what else runs here does not count; with one thread they are those
of an idle machine. `planned` is what `longspan plan --gpus cpu` says with the recipe's memory settings; `probed` is
that corrected by two short rows, as `--probe` does it (of the tiny model 512 and 2,048 tokens, so its row of 2K is
one that it has seen). The whole of SmolLM2: --models smollm2-135m.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from longspan.plan.models import published_configs

TINY = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 768, "vocab_size": 4096, "max_position_embeddings": 8192,
}  # fmt: skip
SMOLLM = published_configs()["smollm2-135m"]


class Sizes(NamedTuple):
    """A model, and which rows of it are run."""

    config: dict[str, Any]
    lengths: tuple[int, ...]
    probed: tuple[int, int]
    steps: int
    """At each length; the first does not count."""


MODELS = {
    "tiny": Sizes(TINY, (2048, 4096), (512, 2048), 3),
    # A fifth of the layers, which are alike: a step of all takes minutes.
    "smollm2-135m, 6 layers": Sizes({**SMOLLM, "num_hidden_layers": 6}, (2048,), (512, 1024), 2),
    "smollm2-135m": Sizes(SMOLLM, (2048,), (512, 1024), 2),
}
HEAP = "MALLOC_MMAP_THRESHOLD_"


def case(model: str, folder: Path, *, lora: bool) -> dict[str, Any]:
    """Return what is planned and measured for each length."""
    import torch

    from longspan.models.hf import build_model, save_model
    from longspan.plan.cost import step_seconds
    from longspan.plan.hardware import Gpu
    from longspan.plan.scale import layer_seconds
    from longspan.plan.training import training_memory
    from longspan.train import probe
    from longspan.train.config import TrainConfig
    from longspan.train.fit import adapters
    from longspan.train.known_models import known_model
    from longspan.train.machine import measured_cpu

    sizes = MODELS[model]
    longest = max(sizes.lengths)
    stage = {
        "name": "long", "context_length": longest, "batch_tokens": longest, "tokens": longest,
        "lr": 1e-4, "streams": {"text": {"rows": "none"}},
    }  # fmt: skip
    save_model(build_model(sizes.config, seed=0), folder)
    recipe = {"model": {"path": str(folder)}, "stages": [stage], **({"lora": {"rank": 16}} if lora else {})}
    config = TrainConfig.from_dict(recipe)
    known = known_model(config.model, folder)
    shape = known.shape
    assert shape is not None
    lengths = sorted({*sizes.probed, *sizes.lengths})
    steps = {tokens: probe._step(config, config.stages[0], tokens, cuda=False) for tokens in lengths}

    def estimate(gpu: Gpu, tokens: int) -> tuple[float, float]:
        step = steps[tokens]
        layers = layer_seconds(shape, gpu, step.parallel, context=tokens, num_gpus=1)
        memory = training_memory(shape, step)
        grows = 1.0 if gpu.measured is None else gpu.measured.activations
        seconds = step_seconds(shape, gpu, step, layers, num_gpus=1, micro_steps=1)
        return seconds, memory.scaled(grows).device + gpu.workspace

    # The clock of the planner and of the steps.
    with (
        mock.patch.object(time, "perf_counter", time.process_time),
        mock.patch.object(probe, "STEPS", sizes.steps),
    ):
        gpu = measured_cpu(shape, adapters(config.lora))
        found = dict(
            zip(lengths, probe._measure(config, config.stages[0], known, lengths, torch.device("cpu")))
        )
    seen = [
        probe._beside(shape, gpu, steps[tokens], training_memory(shape, steps[tokens]), *found[tokens])
        for tokens in sizes.probed
    ]
    probed, lines = probe.correction(gpu, seen)
    return {
        "lines": lines,
        "measured": gpu._replace(measured=None)._asdict() | gpu.measured._asdict(),
        "rows": [
            {
                "tokens": tokens,
                "seconds": found[tokens][0],
                "bytes": found[tokens][1],
                "planned": estimate(gpu, tokens),
                "probed": estimate(probed, tokens),
            }
            for tokens in sizes.lengths
        ],
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", help="run one case in this process and print JSON")
    parser.add_argument("--models", default="tiny;smollm2-135m, 6 layers")
    parser.add_argument("--heaps", default=",262144", help="of MALLOC_MMAP_THRESHOLD_; empty: unset")
    one = parser.parse_args()
    if one.one is not None:
        model, way = one.one.split(":")
        with tempfile.TemporaryDirectory(prefix="plan-cpu-") as folder:
            print(json.dumps(case(model, Path(folder) / "model", lora=way == "lora")))
        return
    print(
        "| model | trained | rows | heap | step, s | planned | probed | peak, GB | planned | probed |\n"
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|"
    )
    errors: dict[str, list[float]] = {}
    for model in one.models.split(";"):
        for way in ("lora", "whole"):
            for heap in one.heaps.split(","):
                found = _in_process(model, way, heap)
                for row in found["rows"]:
                    cells = []
                    for index, unit in ((0, "seconds"), (1, "bytes")):
                        measured = row[unit]
                        shown = f"{measured:.2f}" if index == 0 else f"{measured / 1e9:.2f}"
                        off = {name: row[name][index] / measured - 1 for name in ("planned", "probed")}
                        for name, error in off.items():
                            errors.setdefault(f"{name} {unit}", []).append(abs(error))
                        cells += [shown, *(f"{error:+.0%}" for error in off.values())]
                    words = "its own" if not heap else f"threshold {heap}"
                    print(
                        f"| {model} | {way} | {row['tokens']:,} | {words} | {' | '.join(cells)} |", flush=True
                    )
                print(json.dumps(found), file=sys.stderr, flush=True)
    for name, many in errors.items():
        print(f"\n{name}: median error {statistics.median(many):.0%}, largest {max(many):.0%}")


def _in_process(model: str, way: str, heap: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != HEAP}
    environment |= {"OMP_NUM_THREADS": "1", **({HEAP: heap} if heap else {})}
    command = [sys.executable, "-m", "benchmarks.plan_cpu", "--one", f"{model}:{way}"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
