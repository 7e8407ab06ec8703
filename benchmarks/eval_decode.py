"""How fast many short prompts are answered, beside transformers' own `generate`.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/eval_decode.py              a random model of 6 layers
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/eval_decode.py --model DIR  a model that transformers loads
    ... --prompts 96 --groups 6 --lengths 16,64 --answers 16,1024                groups that share room
    python benchmarks/eval_decode.py --dry-run                                   tiny sizes: does it run?

One process, one thread, fp32, greedy. Prompts of random tokens have different lengths, evenly spread from the
shortest to the longest. Answers have all the same length, or their own, evenly spread as well: transformers is told by
a stopping criterion that ends each row by itself, longspan by the number of tokens of each request. transformers gets
all prompts as one batch that is filled up on the left. The two take turns; medians of CPU seconds are compared. For
the seconds of decoding those of answers of one token, which is what reading costs, are taken off.

With --groups each group of prompts begins with the same 256 tokens, and lengths of answers are spread by their
logarithm. longspan may hold the keys of one group at once: asked for all together it writes answers of the next
groups in room that is free, asked for one group after the other it cannot. transformers gets a batch for each group.
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


SHARED = 256
"""Tokens that the prompts of a group have in common."""


class Workload(NamedTuple):
    """What is asked."""

    prompts: int
    lengths: tuple[int, int]
    """Of the prompts, the shortest and the longest."""
    answers: tuple[int, int]
    """Tokens of the answers, the fewest and the most."""
    groups: int = 1


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


def groups_of(workload: Workload, vocabulary: int) -> list[list[Request]]:
    """Return groups of prompts of random tokens that begin alike."""
    rng = np.random.default_rng(0)
    lengths = spread(workload.prompts, workload.lengths, 1)
    answers = np.geomspace(*workload.answers, workload.prompts).round().astype(int)
    answers = np.random.default_rng(2).permutation(answers).tolist()
    groups: list[list[Request]] = []
    for index, (length, answer) in enumerate(zip(lengths, answers)):
        if index % (workload.prompts // workload.groups) == 0:
            shared = rng.integers(4, vocabulary, SHARED)
            groups.append([])
        ids = np.concatenate([shared, rng.integers(4, vocabulary, length)])
        groups[-1].append(Request("", ids, max_new_tokens=answer))
    return groups


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
    found = in_turns(
        {
            "longspan": lambda: ours(answerer, requests),
            "transformers": lambda: theirs(peer, requests),
            "longspan reading": lambda: ours(answerer, reading),
            "transformers reading": lambda: theirs(peer, reading),
        },
        turns,
    )
    cpu_s, first = found["cpu_s"], found.pop("first")
    for name in ("longspan", "transformers"):
        cpu_s[f"{name} decoding"] = cpu_s[name] - cpu_s.pop(f"{name} reading")
    return {**workload._asdict(), "equal": equal(first["longspan"], first["transformers"]), **found}


def measure_groups(
    model: PreTrainedModel, peer: PreTrainedModel, workload: Workload, turns: int
) -> dict[str, Any]:
    """Let groups be answered together and one after the other, with room for one."""
    groups = groups_of(workload, peer.config.vocab_size)
    # Rooms of answers are rounded up.
    rows = [SHARED + sum(len(each.prompt_ids) - SHARED + 320 for each in group) for group in groups]
    answerer = answerer_of(model, cache_tokens=max(rows))
    together = [request for group in groups for request in group]
    found = in_turns(
        {
            "together": lambda: ours(answerer, together),
            "one by one": lambda: [answer for group in groups for answer in ours(answerer, group)],
            "transformers": lambda: [answer for group in groups for answer in theirs(peer, group)],
        },
        turns,
    )
    first = found.pop("first")
    same = {name: equal(first["together"], first[name]) for name in ("one by one", "transformers")}
    return {**workload._asdict(), "equal": same, **found}


def answerer_of(model: PreTrainedModel, **options: Any) -> LocalAnswerer:
    """Return what an evaluation asks."""
    return LocalAnswerer(model, NoText(), identity={}, batch_tokens=16384, **options)  # type: ignore[arg-type]


def equal(answers: Answers, others: Answers) -> int:
    """Return how many answers are equal, token by token."""
    return sum(one == other for one, other in zip(answers, others))


def in_turns(ways: dict[str, Callable[[], Answers]], turns: int) -> dict[str, Any]:
    """Let several ways take turns; return medians and all of their CPU seconds, and their first answers."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, Answers] = {}
    for turn in range(turns):
        for name, way in ways.items():
            taken, answers = timed(way)
            seconds[name].append(taken)
            first.setdefault(name, answers)
            print(f"turn {turn + 1}: {name} {taken:.2f} s", file=sys.stderr)
    cpu_s = {name: statistics.median(each) for name, each in seconds.items()}
    return {"cpu_s": cpu_s, "all": seconds, "first": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; default: a random one")
    parser.add_argument("--prompts", default="16,64")
    parser.add_argument("--lengths", default="16,256", help="shortest and longest prompt")
    parser.add_argument("--answers", default="64,64 8,64", help="tokens of answers, fewest and most; several")
    parser.add_argument("--groups", type=int, help="let so many groups share the room of one")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    if options.dry_run:
        options.prompts, options.lengths, options.answers, options.turns = "4", "2,8", "2,4", 1
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
    pairs = [tuple(int(number) for number in each.split(",")) for each in options.answers.split()]
    lengths = tuple(int(number) for number in options.lengths.split(","))
    workloads = [
        Workload(int(prompts), lengths, answers, options.groups or 1)
        for prompts in options.prompts.split(",")
        for answers in pairs
    ]
    if options.groups is None:
        answerer = answerer_of(model)
        rows = [measure(answerer, peer, workload, options.turns) for workload in workloads]
    else:
        rows = [measure_groups(model, peer, workload, options.turns) for workload in workloads]
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(None), "rows": rows}, indent=1))
    print_table(rows) if options.groups is None else print_groups(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
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


def print_groups(rows: list[dict[str, Any]]) -> None:
    print(
        "| prompts | groups | tokens of answers | CPU s together | one by one | transformers "
        "| times one by one | times transformers | equal to one by one | to transformers |"
    )
    print("|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cpu, same = row["cpu_s"], row["equal"]
        print(
            f"| {row['prompts']} | {row['groups']} | {_span(row['answers'])} | {cpu['together']:.2f} "
            f"| {cpu['one by one']:.2f} | {cpu['transformers']:.2f} | {cpu['one by one'] / cpu['together']:.2f} "
            f"| {cpu['transformers'] / cpu['together']:.2f} | {same['one by one']} of {row['prompts']} "
            f"| {same['transformers']} of {row['prompts']} |"
        )


def _span(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]} to {bounds[1]}"


if __name__ == "__main__":
    main()
