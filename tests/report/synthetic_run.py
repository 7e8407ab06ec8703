"""A run folder as a finished small job leaves it: 6 lengths x 5 depths x 8 samples, 5 labels, controls, training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (128, 256, 512, 1024, 1536, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 8
LABELS = ("before", "after", "theta_only", "ntk", "pi")
ABLATIONS = {
    "ablate_short_rows": "The same extra tokens in 256-token rows: shows that more training alone does not "
    "extend the context. One seed.",
    "ablate_theta_kept": "2,048-token rows with theta kept at 10,000: shows what long rows do without the larger "
    "theta. One seed.",
}
ROPE = {"before": 1e4, "after": 1e5, "theta_only": 1e5, "ntk": 9.2e4, "pi": 1e4}
BUCKETS = ((0, 128), (128, 256), (256, 512), (512, 1024), (1024, 1536), (1536, 2048))


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_records(path: Path, head: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    write_lines(path, [head, *samples, {"kind": "footer", "samples": len(samples)}])


def header(task: str, label: str, *, note: str | None = None, trained: int | None = None) -> dict[str, Any]:
    """Return the first line of a record file."""
    after = label == "after" or label.startswith("ablate_")
    return {
        "kind": "header",
        "task": task,
        "label": label,
        "model": {
            "path": f"models/{'final' if after else 'base'}",
            "fingerprint": "5f0c2a9be1d47780",
            "rope": {
                "rope_type": "linear" if label == "pi" else "default",
                "rope_theta": ROPE.get(label, 1e4),
            },
            "trained_length": trained or (2048 if after else 256),
        },
        "tokenizer": "c7d1e0",
        "seed": 7,
        "params": {"scorer": "exact_match", "mode": "teacher_forced"} | ({"note": note} if note else {}),
        "versions": {"longspan": "0.1.0", "torch": "2.13.0"},
        "created": "2026-03-14T09:26:53+00:00",
    }


def chance(label: str, length: int, depth: float) -> float:
    """How often a label answers right: short before, long after, in between without training."""
    reach = {"before": 8.6, "after": 12.9, "theta_only": 9.3, "ntk": 9.0, "pi": -9.0}.get(label, 10.4)
    near = 0.9 * (depth - 0.5)
    return 0.985 / (1 + math.exp(-2.4 * (reach + near - math.log2(length) + 0.35)))


def needle_lines(label: str, rng: np.random.Generator, *, distractors: int = 0) -> list[dict[str, Any]]:
    """Return the sample lines of one needle evaluation."""
    words = ("copper", "meadow", "lantern", "harbour", "violet", "quartz", "saddle", "ember")
    lines = []
    for length in LENGTHS:
        for depth in DEPTHS:
            for sample in range(SAMPLES):
                word, number = words[sample], 10007 + 7919 * sample % 89_999
                right = rng.random() < chance(label, length, depth) * (0.55 if distractors else 1.0)
                lines.append(
                    {
                        "kind": "sample",
                        "id": f"{length}-{depth}-{sample}",
                        "length": length,
                        "depth": depth,
                        "sample": sample,
                        "prompt_sha256": f"{length:x}{sample:x}" * 8,
                        "achieved_length": length - 3,
                        "achieved_depth": round(min(1.0, depth + 0.004), 4),
                        "question": f"The magic number of {word} is",
                        "expected": str(number),
                        "output": str(number) if right else str(number + 11),
                        "score": 1.0 if right else 0.0,
                        "unscored": None,
                        "needle_window": "        if self.closed:\n            raise ValueError('closed file')\n"
                        f"The magic number of {word} is {number}.\n"
                        "        return self.buffer.read(size)\n\n    def seek(self):\n",
                        "num_distractors": distractors,
                    }
                )
    return lines


def ppl_lines(label: str) -> list[dict[str, Any]]:
    """Return perplexity windows whose loss grows past the trained length unless the model was extended."""
    lines = []
    limit = {"before": 256, "theta_only": 400, "ntk": 380, "pi": 2048}.get(label, 2048)
    base = {"pi": 4.9, "theta_only": 2.62, "ntk": 2.6}.get(label, 2.51 if label == "before" else 2.49)
    for length in LENGTHS:
        for source, shift in (("code", -0.25), ("reference", 0.3)):
            for window in range(3):
                buckets = []
                for start, end in BUCKETS:
                    if start >= length:
                        break
                    over = max(0.0, math.log2(end / limit)) if limit < 2048 else -0.05 * math.log2(end / 128)
                    nll = base + shift + 0.5 * over + 0.01 * window
                    buckets.append(
                        {
                            "start": start,
                            "end": min(end, length),
                            "tokens": min(end, length) - start,
                            "nll": nll * (min(end, length) - start),
                        }
                    )
                lines.append(
                    {
                        "kind": "sample",
                        "id": f"{source}-{window}",
                        "source": source,
                        "length": length,
                        "buckets": buckets,
                        "unscored": None,
                    }
                )
    return lines


def metric_lines(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return 500 logged steps in two stages."""
    lines = []
    for step in range(1, 501):
        stage, context = ("base", 256) if step <= 300 else ("extend", 2048)
        at = step / 300 if step <= 300 else (step - 300) / 200
        loss = 2.5 + 4.2 * math.exp(-5 * at) if step <= 300 else 2.42 + 0.5 * math.exp(-7 * at)
        noise = 0.09 * rng.standard_normal()
        lines.append(
            {
                "step": step,
                "stage": stage,
                "stage_step": step if step <= 300 else step - 300,
                "context_length": context,
                "tokens": step * 4096,
                "loss": loss + noise,
                "lr": 0.02 * min(1, step / 20) * min(1.0, (1.05 - at) / 0.45)
                if step <= 300
                else 0.007 * min(1.0, (1.03 - at) / 0.6),
                "grad_norm": 1.0 + 0.2 * rng.random(),
                "tokens_per_s": 21000.0 if step <= 300 else 11000.0,
                "loss_by_source": {
                    "code": loss - 0.2 + noise,
                    "recall": loss * 1.1 - 1.2 * at + noise,
                    "reference": loss + 0.35 - noise,
                },
                "loss_by_position": {
                    "0-128": loss + 0.3,
                    "128-256": loss,
                    **(
                        {
                            "256-512": loss - 0.05 + noise,
                            "512-1024": loss - 0.12,
                            "1024-2048": loss - 0.2 - noise,
                        }
                        if context > 256
                        else {}
                    ),
                },
                "seconds": step * 0.2 if step <= 300 else 60 + (step - 300) * 0.38,
            }
        )
    return lines


def length_summary(name: str, title: str, tilt: float) -> dict[str, Any]:
    """Return a log2 histogram per source, moved to longer documents by `tilt`."""
    edges = [2**n for n in range(5, 17)]
    sources = {}
    for source, centre in (("code", 11.2), ("reference", 9.1), ("recall", 10.2)):
        middles = np.arange(5.5, 16)
        tokens = np.exp(-0.5 * ((middles - centre) / 1.5) ** 2) * 2 ** (tilt * (middles - centre))
        tokens = (tokens / tokens.sum() * 4e6).round().astype(int)
        above = {
            str(n): float(tokens[middles > math.log2(n)].sum() / tokens.sum()) for n in (256, 2048, 16384)
        }
        sources[source] = {
            "documents": int((tokens / 2**middles).sum()),
            "tokens": int(tokens.sum()),
            "quantiles": {
                "p25": 190,
                "p50": int(2 ** (centre - 1.5)),
                "p75": 2100,
                "p90": int(2**centre),
                "p99": int(2 ** (centre + 2)),
                "max": 65000,
            },
            "share_above": above,
            "histogram": {"edges": edges, "tokens": tokens.tolist()},
        }
    return {"name": name, "title": title, "sources": sources}


RULER = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
         "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2")  # fmt: skip


def sample_line(name: str, score: float | None, **fields: Any) -> dict[str, Any]:
    """Return a sample line with what every task records."""
    measured = {"prompt_tokens": 900, "completion_tokens": 12, "seconds": 0.25, "prompt_sha256": "ab" * 32}
    reason = None if score is not None else "the server did not answer"
    text = {"expected": "Lisbon", "output": "" if score is None else "Lisbon" if score == 1 else "Porto"}
    return {"kind": "sample", "id": name, **text, "score": score, "unscored": reason, **measured, **fields}


def placed_lines(label: str, rng: np.random.Generator, *, per_cell: int = 8) -> list[dict[str, Any]]:
    """Return the samples of a generated task by length and depth, one of them without a score."""
    lines = []
    for length in LENGTHS:
        for depth in DEPTHS:
            for sample in range(per_cell):
                right = float(rng.random() < chance(label, length, depth))
                number = str(48_000 + 17 * sample)
                lines.append(
                    sample_line(
                        f"{length}-{depth}-{sample}",
                        None if (length, depth, sample) == (512, 0.5, 3) else right,
                        length=length,
                        depth=depth,
                        sample=sample,
                        achieved_length=length - 1,
                        achieved_depth=depth,
                        question="What is the pass key?",
                        expected=number,
                        output=f" {number}" if right else " 11111",
                        needle_window=f"The grass is green. The sky is blue. The pass key is {number}. "
                        f"Remember it. {number} is the pass key. The sun is yellow.",
                        prompt_tokens=length,
                        seconds=length * 1e-4,
                    )
                )
    return lines


def ruler_lines(label: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return ten samples of each subtask and length; one of two answers found is a score of a half."""
    return [
        sample_line(
            f"{subtask}-{length}-{n}",
            float(rng.choice((1.0, 1.0, 0.5)) * (rng.random() < chance(label, length, 1.0))),
            subtask=subtask,
            length=length,
            sample=n,
            expected=["48213", "10007"] if subtask == "niah_multivalue" else "48213",
            output="48213, 10008",
            prompt_tokens=length,
        )
        for subtask in RULER
        for length in LENGTHS[2:]
        for n in range(10)
    ]


def topic_lines(label: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return samples of 5, 10 and 20 topics, each with the length that it came to."""
    return [
        sample_line(
            f"{topics}-{n}",
            float(rng.random() < chance(label, length, 0.5)),
            num_topics=topics,
            length=length + n,
            sample=n,
            question="What was the first topic?",
        )
        for topics, length in ((5, 512), (10, 1024), (20, 2048))
        for n in range(12)
    ]


def longqa_lines(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return graded answers on three data sets."""
    sets = (("qasper", "qa_f1"), ("gov_report", "rouge_l"), ("trec", "classification"))
    return [
        sample_line(
            f"{dataset}-{n}",
            round(float(rng.random()), 3),
            dataset=dataset,
            metric=metric,
            length=1500 + n,
            question="Who wrote it?",
            expected=["Ada Lovelace", "Lovelace"],
            output="It was written by Lovelace.",
        )
        for dataset, metric in sets
        for n in range(15)
    ]


def harness_lines(lost: int) -> list[dict[str, Any]]:
    """Return 60 questions of two subjects, every third wrong, and `lost` more of the right ones wrong."""
    lines = []
    for subject in ("mmlu_anatomy", "mmlu_law"):
        for n in range(30):
            right = float(n % 3 > 0 and n // 3 >= (lost if n % 3 == 1 else 0))
            fields = {
                "dataset": "mmlu",
                "subtask": subject,
                "metric": "acc",
                "sample": n,
                "prompt_tokens": 180,
            }
            lines.append(sample_line(f"{subject}-{n}", right, **fields))
    lines += [
        sample_line(
            f"topic-{count}-{n}",
            float(n < 6),
            dataset="longeval",
            subtask="topic_retrieval",
            metric="contains",
            num_topics=count,
        )
        for count in (5, 10)
        for n in range(count)
    ]
    lines += [
        sample_line(f"arc-{n}", float(n % 2), dataset="arc_easy", subtask="", metric="acc_norm", sample=n)
        for n in range(40)
    ]
    return lines


def build_evaluated(path: Path, labels: tuple[str, ...] = ("before", "after"), *, seed: int = 11) -> Path:
    """Write a run folder of evaluations alone: all tasks, two labels, an unknown task, and a price."""
    rng = np.random.default_rng(seed)
    for label in labels:

        def put(task: str, lines: list[dict[str, Any]], label: str = label) -> None:
            write_records(path / f"records/{task}-{label}.jsonl", header(task, label), lines)

        put("needle", needle_lines(label, rng))
        put("passkey", placed_lines(label, rng))
        put("needle_multikey", placed_lines(label, rng, per_cell=4))
        put("ruler", ruler_lines(label, rng))
        put("topics", topic_lines(label, rng))
        put("longqa", [{**line, "cost": 0.0004} for line in longqa_lines(rng)])
        put("harness", harness_lines(0 if label == "before" else 2))
        put("haiku", [sample_line(f"h{n}", 3.0 + n, subtask="syllables") for n in range(4)])
        put("ppl", ppl_lines(label))
    return path


def build_run(path: Path) -> Path:
    """Write a complete run folder."""
    rng = np.random.default_rng(7)
    for label in LABELS:
        write_records(
            path / f"records/needle-{label}.jsonl", header("needle", label), needle_lines(label, rng)
        )
        write_records(path / f"records/ppl-{label}.jsonl", header("ppl", label), ppl_lines(label))
    for label, note in ABLATIONS.items():
        write_records(
            path / f"records/needle-{label}.jsonl",
            header("needle", label, note=note),
            needle_lines(label, rng),
        )
        write_records(path / f"records/ppl-{label}.jsonl", header("ppl", label, note=note), ppl_lines(label))
    for label in ("before", "after"):
        write_records(
            path / f"records/needle_distractors-{label}.jsonl",
            header("needle_distractors", label),
            needle_lines(label, rng, distractors=3),
        )
    write_lines(path / "metrics.jsonl", metric_lines(rng))
    (path / "lengths").mkdir()
    for name, title, tilt in (("before", "as collected", 0.0), ("after_upsampling", "after upsampling", 0.7)):
        (path / f"lengths/{name}.json").write_text(json.dumps(length_summary(name, title, tilt)))
    phases = (
        ("corpus", 3.1),
        ("tokenize", 2.4),
        ("train base", 61.0),
        ("evaluate before", 8.2),
        ("train extend", 76.0),
        ("evaluate after", 8.4),
        ("report", 1.2),
    )
    write_lines(
        path / "events.jsonl",
        [
            {"time": "2026-03-14T09:26:53+00:00", "event": "phase", "phase": p, "seconds": s}
            for p, s in phases
        ],
    )
    versions = {"longspan": "0.1.0", "torch": "2.13.0", "numpy": "2.3.1", "gigatoken": None}
    (path / "env.json").write_text(
        json.dumps(
            {
                "seed": 7,
                "command": ["longspan", "quickstart"],
                "python": "3.11.9",
                "platform": "Linux-6.1-x86_64",
                "processor": "Example CPU",
                "cpus": 2,
                "versions": versions,
            }
        )
    )
    (path / "config.yaml").write_text(
        "model:\n  layers: 2\n  hidden: 128\nstages:\n- name: base\n  length: 256\n"
        "- name: extend\n  length: 2048\n  rope:\n    theta: 100000.0\n"
    )
    return path
