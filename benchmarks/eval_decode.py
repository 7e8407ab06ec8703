"""How fast many short prompts are answered, beside transformers' own `generate`.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/eval_decode.py              a random model of 6 layers
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/eval_decode.py --model DIR  a model that transformers loads
    python benchmarks/eval_decode.py --dry-run                                   tiny sizes: does it run?

One process, one thread, fp32, greedy. Prompts of random tokens have different lengths, evenly spread from the
shortest to the longest. Answers have all the same length, or their own, evenly spread as well: transformers is told by
a stopping criterion that ends each row by itself, longspan by the number of tokens of each request. transformers gets
all prompts as one batch that is filled up on the left. The two take turns; medians of CPU seconds are compared. For
the seconds of decoding those of answers of one token, which is what reading costs, are taken off.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from data_measure import machine
from longspan.infer.local import LocalAnswerer
from longspan.infer.requests import Request
from longspan.models.hf import build_model, load_model

MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
}


class Workload(NamedTuple):
    """What is asked."""

    prompts: int
    lengths: tuple[int, int]
    """Of the prompts, the shortest and the longest."""
    answers: tuple[int, int]
    """Tokens of the answers, the fewest and the most."""


class NoText:
    """Stands in for a tokenizer: what is measured is not the text."""

    def decode(self, ids: Any) -> str:
        return ""


class OwnLength(StoppingCriteria):
    """Ends each row after its own number of new tokens."""

    def __init__(self, prompt: int, limits: torch.Tensor) -> None:
        self._prompt, self._limits = prompt, limits

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] - self._prompt >= self._limits


def spread(count: int, bounds: tuple[int, int], seed: int) -> list[int]:
    """Return so many whole numbers, evenly spread over the bounds, in random order."""
    numbers = np.linspace(*bounds, count).round().astype(int)
    return np.random.default_rng(seed).permutation(numbers).tolist()


def requests_of(workload: Workload, vocabulary: int) -> list[Request]:
    """Return prompts of random tokens."""
    rng = np.random.default_rng(0)
    lengths = spread(workload.prompts, workload.lengths, 1)
    answers = spread(workload.prompts, workload.answers, 2)
    return [
        Request("", rng.integers(4, vocabulary, length), max_new_tokens=answer)
        for length, answer in zip(lengths, answers)
    ]


Answers = list[list[int]]


def ours(answerer: LocalAnswerer, requests: list[Request]) -> Answers:
    """Answer as an evaluation does."""
    found = dict(answerer.generate(requests))
    return [found[index].token_ids.tolist() for index in range(len(requests))]


@torch.inference_mode()
def theirs(peer: PreTrainedModel, requests: list[Request]) -> Answers:
    """Answer with `generate`, in one batch."""
    longest = max(len(request.prompt_ids) for request in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, longest - len(request.prompt_ids) :] = torch.from_numpy(request.prompt_ids)
        mask[row, longest - len(request.prompt_ids) :] = 1
    limits = torch.tensor([request.max_new_tokens for request in requests])
    found = peer.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=int(limits.max()),
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([OwnLength(longest, limits)]),
    )
    return [row[longest : longest + limit].tolist() for row, limit in zip(found, limits.tolist())]


def timed(action: Callable[[], Answers]) -> tuple[float, Answers]:
    """Run and take CPU seconds."""
    gc.collect()
    started = time.process_time()
    answers = action()
    return time.process_time() - started, answers


def measure(answerer: LocalAnswerer, peer: PreTrainedModel, workload: Workload, turns: int) -> dict[str, Any]:
    """Let both sides answer in turns."""
    requests = requests_of(workload, peer.config.vocab_size)
    reading = [request._replace(max_new_tokens=1) for request in requests]
    ways: dict[str, Callable[[], Answers]] = {
        "longspan": lambda: ours(answerer, requests),
        "transformers": lambda: theirs(peer, requests),
        "longspan reading": lambda: ours(answerer, reading),
        "transformers reading": lambda: theirs(peer, reading),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, Answers] = {}
    for turn in range(turns):
        for name, way in ways.items():
            taken, answers = timed(way)
            seconds[name].append(taken)
            first.setdefault(name, answers)
            print(f"{workload.prompts} prompts, turn {turn + 1}: {name} {taken:.2f} s", file=sys.stderr)
    equal = sum(our == their for our, their in zip(first["longspan"], first["transformers"]))
    cpu_s = {name: statistics.median(each) for name, each in seconds.items()}
    for name in ("longspan", "transformers"):
        cpu_s[f"{name} decoding"] = cpu_s[name] - cpu_s.pop(f"{name} reading")
    return {**workload._asdict(), "equal": equal, "cpu_s": cpu_s, "all": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; default: a random one")
    parser.add_argument("--prompts", default="16,64")
    parser.add_argument("--lengths", default="16,256", help="shortest and longest prompt")
    parser.add_argument("--answers", default="64,64 8,64", help="tokens of answers, fewest and most; several")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    if options.dry_run:
        options.prompts, options.lengths, options.answers, options.turns = "3", "2,8", "2,4", 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = options.model
        if path is None:
            path = Path(folder) / "model"
            build_model(MODEL, seed=0).save_pretrained(path)
        model = load_model(path, dtype=torch.float32).eval()
        peer = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
    # Answers end by their length alone, whatever the model's folder says.
    peer.generation_config = type(peer.generation_config)()
    answerer = LocalAnswerer(model, NoText(), identity={}, batch_tokens=16384)  # type: ignore[arg-type]
    pairs = [tuple(int(number) for number in each.split(",")) for each in options.answers.split()]
    lengths = tuple(int(number) for number in options.lengths.split(","))
    rows = [
        measure(answerer, peer, Workload(int(prompts), lengths, answers), options.turns)
        for prompts in options.prompts.split(",")
        for answers in pairs
    ]
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(None), "rows": rows}, indent=1))
    print(
        "| prompts | tokens of prompts | of answers | CPU s longspan | transformers | times | times, decoding | equal |"
    )
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        cpu = row["cpu_s"]
        print(
            f"| {row['prompts']} | {_span(row['lengths'])} | {_span(row['answers'])} | {cpu['longspan']:.2f} "
            f"| {cpu['transformers']:.2f} | {cpu['transformers'] / cpu['longspan']:.2f} "
            f"| {cpu['transformers decoding'] / cpu['longspan decoding']:.2f} | {row['equal']} of {row['prompts']} |"
        )


def _span(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


if __name__ == "__main__":
    main()
