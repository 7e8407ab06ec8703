"""What prefix reuse saves in a needle grid, and how fast RULER's samples are made.

    python benchmarks/eval.py                        the tables of eval.md, about half an hour on one core
    python benchmarks/eval.py --only grid,multi_key  parts of it: grid, multi_key, published, ruler
    python benchmarks/eval.py --dry-run              tiny sizes: does it run?

One process, one thread, fp32, a Llama with random weights: what it answers is noise, but the same noise whichever
way it is asked. Three ways to run the same cells take turns, and medians of CPU seconds are compared:

    shared      `run_task` with the engine that reads common prefixes once
    alone       `run_task` with its twin that reads each prompt by itself (--no-prefix-reuse)
    per cell    as the published scripts do: the whole haystack is tokenised for every cell, cut and decoded, the
                prompt is tokenised again, and transformers (SDPA) reads it alone, with logits of all positions
                where the answer is given and `generate` where it is not
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from data_measure import machine
from longspan.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from longspan.eval.held_out import HeldOutDocument, default_documents
from longspan.eval.needle import NeedleTask
from longspan.eval.needle_config import NeedleConfig
from longspan.eval.needle_cost import grid_cost
from longspan.eval.needle_multikey import MultiKeyTask
from longspan.eval.prompts import PromptForm
from longspan.eval.records import read_records
from longspan.eval.ruler.cache import SampleCache
from longspan.eval.ruler.task import Ruler, RulerConfig
from longspan.eval.runner import run_task
from longspan.infer.flops import ModelFlops
from longspan.infer.local import LocalAnswerer
from longspan.infer.plain import PlainAnswerer
from longspan.infer.requests import Request
from longspan.models.hf import build_model
from published_grids import LLAMA_2_7B, PUBLISHED_GRIDS, reuse_factor

BATCH_TOKENS = 2048
IDENTITY = {"path": "random", "fingerprint": "random", "rope": {}, "trained_length": 4096}


class Sizes(NamedTuple):
    """How much is measured."""

    model: dict[str, int]
    vocab: int
    lengths: tuple[int, ...]
    multi_key_lengths: tuple[int, ...]
    depths: int
    new_tokens: int
    rounds: int
    ruler_length: int
    ruler_samples: int


FULL = Sizes(
    model={
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    vocab=8192,
    lengths=tuple(range(256, 2049, 256)),
    multi_key_lengths=(512, 1024, 2048),
    depths=11,
    new_tokens=8,
    rounds=3,
    ruler_length=131072,
    ruler_samples=100,
)
DRY = Sizes(
    model={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    vocab=512,
    lengths=(192, 256),
    multi_key_lengths=(512,),
    depths=3,
    new_tokens=2,
    rounds=1,
    ruler_length=8192,
    ruler_samples=1,
)


class Setting(NamedTuple):
    """What all parts share."""

    sizes: Sizes
    work: Path
    documents: list[HeldOutDocument]
    tokenizer: Tokenizer
    model: PreTrainedModel
    peer: PreTrainedModel


def prepare(sizes: Sizes, work: Path) -> Setting:
    """Make tokenizer and model; the peer has the same weights."""
    documents = default_documents()
    train_bpe([document.text for document in documents], work / "tokenizer", vocab_size=sizes.vocab)
    tokenizer = load_tokenizer(work / "tokenizer")
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": 4096,
        **sizes.model,
    }
    model = build_model(config, seed=0).eval()
    model.save_pretrained(work / "model")
    peer = AutoModelForCausalLM.from_pretrained(work / "model", attn_implementation="sdpa").eval()
    peer.generation_config.eos_token_id = None
    return Setting(sizes, work, documents, tokenizer, model, peer)


class Run(NamedTuple):
    """One way, run once."""

    cpu_s: float
    wall_s: float
    outputs: dict[str, str]
    tokens: int = 0
    attention_flops: int = 0
    flops: float = 0.0


def timed(action: Callable[[], dict[str, str]]) -> Run:
    """Run and take the time."""
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = action()
    return Run(time.process_time() - cpu, time.perf_counter() - wall, outputs)


def by_task(setting: Setting, task: Any, answerer: Any) -> dict[str, str]:
    """Run a task as `longspan eval` does; return each sample's output."""
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        out = Path(folder) / "records.jsonl"
        run_task(task, answerer, tokenizer=setting.tokenizer, label="x", out=out)
        samples = read_records(out).samples
    assert all(sample["unscored"] is None for sample in samples)
    return {sample["prompt_sha256"] + str(sample["expected"]): sample["output"] for sample in samples}


def shared(setting: Setting, make: Callable[[], Any]) -> Run:
    answerer = LocalAnswerer(setting.model, setting.tokenizer, identity=IDENTITY, batch_tokens=BATCH_TOKENS)
    run = timed(lambda: by_task(setting, make(), answerer))
    counters = answerer.counters
    return run._replace(
        tokens=counters.tokens - counters.decoded_tokens,
        attention_flops=counters.attention_flops,
        flops=answerer.flops,
    )


def alone(setting: Setting, make: Callable[[], Any]) -> Run:
    answerer = PlainAnswerer(setting.model, setting.tokenizer, identity=IDENTITY, batch_tokens=BATCH_TOKENS)
    return timed(lambda: by_task(setting, make(), answerer))


def per_cell(setting: Setting, prompts: Sequence[tuple[str, Request]], *, forced: bool) -> Run:
    """Ask transformers cell by cell. Composing the prompts is not counted, tokenising is."""
    tokenizer, text = setting.tokenizer, "".join(document.text for document in setting.documents)
    longest = max(setting.sizes.lengths)

    def ask() -> dict[str, str]:
        outputs = {}
        for key, request in prompts:
            whole = tokenizer.encode(text)
            tokenizer.decode(whole[:longest])
            tokenizer.encode(request.prompt)
            assert request.prompt_ids is not None
            outputs[key] = answer_of_peer(setting, request, forced=forced)
        return outputs

    return timed(ask)


@torch.inference_mode()
def answer_of_peer(setting: Setting, request: Request, *, forced: bool) -> str:
    """Return what transformers answers, with the answer before it or by itself."""
    assert request.prompt_ids is not None
    prompt = torch.from_numpy(np.asarray(request.prompt_ids, dtype=np.int64))[None]
    if not forced:
        ids = setting.peer.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return setting.tokenizer.decode(ids[0, prompt.shape[1] :].numpy())
    assert request.answer_ids is not None
    answer = torch.from_numpy(np.asarray(request.answer_ids, dtype=np.int64))[None]
    logits = setting.peer(torch.cat([prompt, answer], 1), use_cache=False).logits
    start = prompt.shape[1] - 1
    return setting.tokenizer.decode(logits[0, start : start + answer.shape[1]].argmax(-1).numpy())


def grid(setting: Setting, kind: type, mode: str, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Measure one grid the three ways."""
    sizes = setting.sizes
    settings = NeedleConfig.from_dict(
        {
            "lengths": lengths,
            "depths": [step / (sizes.depths - 1) for step in range(sizes.depths)],
            "samples": 1,
            "mode": mode,
            "max_new_tokens": sizes.new_tokens,
        }
    )
    form = PromptForm(setting.tokenizer)
    make = functools.partial(kind, settings, setting.documents, form)
    task = make()
    built = [task.build(planned) for planned in task.plan()]
    prompts = [(prompt_key(each), each.request) for each in built]
    ways: dict[str, Callable[[], Run]] = {
        "shared": lambda: shared(setting, make),
        "alone": lambda: alone(setting, make),
        "per cell": lambda: per_cell(setting, prompts, forced=mode == "teacher_forced"),
    }
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for turn in range(sizes.rounds):
        for name, way in ways.items():
            runs[name].append(way())
            print(f"{kind.__name__} {mode} {turn + 1}: {name} {runs[name][-1].cpu_s:.1f} s", file=sys.stderr)
    first = runs["shared"][0]
    differing = [key for key, output in runs["alone"][0].outputs.items() if first.outputs[key] != output]
    if differing:
        sys.exit(f"{len(differing)} answers differ between shared and alone")
    cost = grid_cost(settings, form, multi_key=kind is MultiKeyTask)
    tokens = sum(len(each.request.prompt_ids) for each in built)
    agreeing = sum(
        first.outputs[key].strip() == output.strip() for key, output in runs["per cell"][0].outputs.items()
    )
    return {
        "task": task.name,
        "mode": mode,
        "cells": len(built),
        "lengths": lengths,
        "tokens": tokens,
        "read": first.tokens,
        "bound": cost.tokens_read,
        "attention": first.attention_flops,
        "attention_alone": sum(attention_flops(setting, len(each.request.prompt_ids)) for each in built),
        "factor_attention": cost.factor_attention,
        "factor_linear": cost.factor_linear,
        "agreeing": agreeing,
        "cpu_s": {name: statistics.median(run.cpu_s for run in each) for name, each in runs.items()},
        "wall_s": {name: statistics.median(run.wall_s for run in each) for name, each in runs.items()},
    }


def prompt_key(built: Any) -> str:
    """Return the key that `by_task` gives the sample's output."""
    from longspan.core.files import sha256_bytes

    return sha256_bytes(built.request.prompt.encode()) + str(built.expected)


def attention_flops(setting: Setting, tokens: int) -> float:
    return ModelFlops.of(setting.model.config).per_pair * tokens * (tokens + 1) / 2


def published() -> list[dict[str, Any]]:
    """State the factor of the published grids in closed form."""
    return [
        {"grid": name, "prompts": len(cells), **reuse_factor(cells, LLAMA_2_7B)._asdict()}
        for name, cells in PUBLISHED_GRIDS.items()
    ]


def ruler(setting: Setting) -> dict[str, Any]:
    """Compose RULER's samples, then take them from the cache; QA questions come from a made file."""
    from longspan.eval.ruler.qa_documents import read_qa

    sizes = setting.sizes
    settings = RulerConfig.from_dict({"lengths": [sizes.ruler_length], "samples": sizes.ruler_samples})
    essay = "\n\n".join(document.text for document in setting.documents)
    qa = [read_qa(path) for path in write_qa(setting)]
    cache = SampleCache(setting.work / "cache")

    def compose() -> dict[str, float]:
        task = Ruler(settings, PromptForm(setting.tokenizer), essay=essay, qa=qa, cache=cache)
        seconds: dict[str, float] = {}
        for planned in task.plan():
            started = time.perf_counter()
            task.build(planned)
            name = str(planned.key[0])
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        return seconds

    cold, warm = compose(), [compose() for _ in range(3)]
    return {
        "length": sizes.ruler_length,
        "samples": sizes.ruler_samples,
        "cold": cold,
        "warm": {name: statistics.median(each[name] for each in warm) for name in cold},
    }


def write_qa(setting: Setting) -> Iterator[Path]:
    """Write questions in SQuAD's and HotpotQA's layouts over the paragraphs of the haystack."""
    texts = [part for each in setting.documents for part in each.text.split("\n\n") if len(part) > 200]
    squad = [
        {
            "title": str(number),
            "paragraphs": [
                {
                    "context": text,
                    "qas": [
                        {
                            "id": str(number),
                            "question": f"Which word begins paragraph {number}?",
                            "answers": [{"text": text.split()[0], "answer_start": 0}],
                            "is_impossible": False,
                        }
                    ],
                }
            ],
        }
        for number, text in enumerate(texts)
    ]
    hotpot = [
        {
            "_id": str(number),
            "question": f"Which word begins paragraph {number}?",
            "answer": text.split()[0],
            "context": [[str(place), [texts[place % len(texts)]]] for place in range(number, number + 10)],
        }
        for number, text in enumerate(texts)
    ]
    for name, content in (("squad.json", {"data": squad}), ("hotpot.json", hotpot)):
        (setting.work / name).write_text(json.dumps(content))
        yield setting.work / name


def render(results: dict[str, Any]) -> Iterator[str]:
    """Yield the tables."""
    machine = results["machine"]
    yield (
        f"{machine['processor']}, {machine['cores']} cores, one thread, Python {machine['python']}, torch "
        f"{torch.__version__}, load average at the start {machine['load_average'][0]:.1f}."
    )
    grids = [*results.get("grid", []), *results.get("multi_key", [])]
    if grids:
        yield ""
        yield (
            "| grid | cells | tokens | read | of the bound | fewer tokens | fewer pairs | CPU s shared | alone "
            "| per cell | alone / shared | per cell / shared | as transformers |"
        )
        yield "|---|" + "---:|" * 12
    for row in grids:
        cpu = row["cpu_s"]
        yield (
            f"| {row['task']}, {row['mode']}, {row['lengths'][0]} to {row['lengths'][-1]} | {row['cells']} "
            f"| {row['tokens']:,} | {row['read']:,} | {row['read'] / row['bound']:.3f} "
            f"| {row['tokens'] / row['read']:.2f} | {row['attention_alone'] / row['attention']:.2f} "
            f"| {cpu['shared']:.1f} | {cpu['alone']:.1f} | {cpu['per cell']:.1f} "
            f"| {cpu['alone'] / cpu['shared']:.2f} | {cpu['per cell'] / cpu['shared']:.2f} "
            f"| {row['agreeing']} of {row['cells']} |"
        )
    if "published" in results:
        yield ""
        yield "| published grid | prompts | linear layers | attention | a 7B Llama-2 |"
        yield "|---|---:|---:|---:|---:|"
        for row in results["published"]:
            yield (
                f"| {row['grid']} | {row['prompts']} | {row['linear']:.2f} | {row['attention']:.2f} "
                f"| {row['all']:.2f} |"
            )
    if "ruler" in results:
        found = results["ruler"]
        yield ""
        title = f"RULER at {found['length']:,} tokens, {found['samples']} samples"
        yield f"| {title} | composed, s | from the cache, s | times |"
        yield "|---|---:|---:|---:|"
        total = {"cold": sum(found["cold"].values()), "warm": sum(found["warm"].values())}
        for name in (*found["cold"], "all"):
            cold, warm = (total[part] if name == "all" else found[part][name] for part in ("cold", "warm"))
            yield f"| {name} | {cold:.2f} | {warm:.3f} | {cold / warm:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="grid,multi_key,published,ruler")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    parts = options.only.split(",")
    sizes = DRY if options.dry_run else FULL
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(None)}
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(sizes, Path(folder))
        modes = ("teacher_forced", "generate")
        measure: dict[str, Callable[[], Any]] = {
            "grid": lambda: [grid(setting, NeedleTask, mode, sizes.lengths) for mode in modes],
            "multi_key": lambda: [
                grid(setting, MultiKeyTask, mode, (length,))
                for length in sizes.multi_key_lengths
                for mode in modes
            ],
            "published": published,
            "ruler": lambda: ruler(setting),
        }
        if unknown := sorted(set(parts) - set(measure)):
            parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(measure)}")
        for part in parts:
            results[part] = measure[part]()
            if options.out:
                options.out.write_text(json.dumps(results, indent=1))
    print("\n".join(render(results)))


if __name__ == "__main__":
    main()
