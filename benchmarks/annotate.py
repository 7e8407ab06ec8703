"""Throughput of annotation against the teacher's own forward pass, output layer included in both.

    OMP_NUM_THREADS=1 python benchmarks/annotate.py                 the table of annotate.md, about five minutes
    OMP_NUM_THREADS=1 python benchmarks/annotate.py --profile       where the time of a row goes

All ways run over the same rows with the same weights, one after the other in turns. Time is that of the process on its
CPU, so that others who use the machine do not count; `wall` is the clock's.
`forward` is what the model's own call computes: hidden states, and logits of every token. `forward, chunks` is the same
with logits of a chunk of tokens at a time in one buffer, which spares the memory. `annotate` is the whole job: rows
from the store, hidden states, logits, top-k, rounding, MDS on disk, manifest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from longspan.annotate.config import AnnotateConfig
from longspan.annotate.job import annotation_folder, open_job
from longspan.data.jobs import LocalExecutor
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import PackPlan, plan_packing
from longspan.data.rows.loader import RowLoader
from longspan.data.store import TokenStore, TokenStoreWriter
from longspan.infer.packed import inference
from longspan.infer.teacher import LocalTeacher
from longspan.kernels.head import top_k
from longspan.kernels.loss import LOGITS_BUDGET_BYTES, product
from longspan.models.documents import Documents
from longspan.models.head import output_head
from longspan.models.hf import build_model, hidden_states, save_model

ROW = 1024
ROWS = 4


class Words(NamedTuple):
    """A tokenizer that only has a size."""

    vocab_size: int
    fingerprint: str = "0" * 16
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None


def make_inputs(root: Path, *, hidden: int, layers: int, vocab: int) -> None:
    """Write a random teacher, a store of random tokens, and a plan of rows."""
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128,
        "max_position_embeddings": ROW, "tie_word_embeddings": False, "initializer_range": 0.1,
    }  # fmt: skip
    save_model(build_model(config, seed=0), root / "model")
    generator = np.random.default_rng(0)
    with TokenStoreWriter(root / "store", config={}, tokenizer=Words(vocab)) as writer:
        for key in range(4 * ROWS):
            writer.add(generator.integers(0, vocab, ROW // 2).astype(np.uint32), source="random", key=key)
    store = TokenStore(root / "store")
    documents = np.arange(2 * ROWS, dtype=np.uint32)
    plan_packing(PackConfig(length=ROW), store.lengths, documents, 0).save(
        root / "plan", stores=[root / "store"]
    )


def measure(*, hidden: int, layers: int, vocab: int, k: int, turns: int) -> dict[str, Any]:
    """Return tokens a second of each way, and ratios: the median over turns in which all ways run."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_inputs(root, hidden=hidden, layers=layers, vocab=vocab)
        job = open_job(
            AnnotateConfig(
                teacher={"model": str(root / "model"), "batch_tokens": ROW}, data=str(root / "plan"), k=k
            )
        )
        teacher = job.teacher
        assert isinstance(teacher, LocalTeacher)
        model = teacher.model
        loader = RowLoader([TokenStore(root / "store")], PackPlan.load(root / "plan"))
        rows = [loader.row(index) for index in range(loader.num_rows)]
        head = output_head(model)
        number = iter(range(10_000))

        def states(row: Any) -> torch.Tensor:
            return hidden_states(
                model, torch.from_numpy(row.input_ids), Documents.from_cu_seqlens(row.cu_seqlens)
            )

        def forward() -> None:
            with inference(model):
                for row in rows:
                    documents = Documents.from_cu_seqlens(row.cu_seqlens)
                    ids = torch.from_numpy(row.input_ids)[None]
                    model(
                        input_ids=ids, position_ids=documents.positions()[None], documents=documents, use_cache=False
                    )  # fmt: skip

        def forward_in_chunks() -> None:
            chunk = LOGITS_BUDGET_BYTES // (4 * vocab)
            buffer = torch.empty(min(chunk, ROW), vocab)
            with inference(model):
                for row in rows:
                    for part in states(row).split(chunk):
                        product(part, head.T, out=buffer[: len(part)])

        def predictions() -> None:
            with inference(model):
                for row in rows:
                    top_k(head, states(row), k)

        def whole_job() -> None:
            out = root / f"out-{next(number)}"
            annotation_folder(job, out, first=0, stop=len(rows)).make(LocalExecutor())

        ways: dict[str, Callable[[], None]] = {
            "forward": forward,
            "forward, chunks": forward_in_chunks,
            "top-k": predictions,
            "annotate": whole_job,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        wall: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(turns + 1):
            for name, way in ways.items():
                started, clock = time.process_time(), time.perf_counter()
                way()
                if turn:  # the first one warms up
                    seconds[name].append(time.process_time() - started)
                    wall[name].append(time.perf_counter() - clock)
    tokens = ROW * len(rows)
    found: dict[str, Any] = {
        "hidden": hidden, "layers": layers, "vocab": vocab, "k": k, "turns": turns, "threads": torch.get_num_threads()
    }  # fmt: skip
    for name, spent in seconds.items():
        found[name] = tokens / statistics.median(spent)
    for against in ("forward", "forward, chunks"):
        for kind, times in (("", seconds), (" (wall)", wall)):
            ratios = [theirs / ours for ours, theirs in zip(times["annotate"], times[against])]
            found[f"annotate / {against}{kind}"] = statistics.median(ratios)
    return found


CASES = (
    # hidden, layers, vocabulary, k
    (512, 8, 32_768, 50),
    (1024, 8, 32_768, 50),
    (1024, 8, 128_256, 50),
)


def main() -> None:
    """Measure the cases, or the one that is given, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("hidden", "layers", "vocab", "k"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    one = (given.hidden, given.layers, given.vocab, given.k)
    cases = CASES if None in one else (one,)
    if given.profile:
        hidden, layers, vocab, k = cases[0]
        with torch.profiler.profile() as profiler:
            measure(hidden=hidden, layers=layers, vocab=vocab, k=k, turns=1)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
        return
    for hidden, layers, vocab, k in cases:
        found = measure(hidden=hidden, layers=layers, vocab=vocab, k=k, turns=given.turns)
        print(
            json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in found.items()}),
            flush=True,
        )


if __name__ == "__main__":
    main()
