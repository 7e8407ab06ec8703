"""An agent's traces from fetching to the report, and calls at their step before and after a short training.

    python benchmarks/agents.py --out bench-agents

A stand-in of 0.5 million parameters is trained on conversations about logs of calls: each is asked for several steps,
and every answer stands behind its true prefix. The commands are those of the recipe `agent-sft-128k`; what differs is
the size. Logs of the evaluation are others than those of the training.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from longspan.cli.main import app
from longspan.core.intervals import wilson_interval
from longspan.core.records import read_jsonl
from longspan.data.tokenizer import Tokenizer, load_tokenizer
from longspan.eval.tool_calls import FORM, INTRODUCTION, QUESTION, TOOLS, History
from longspan.models.hf import build_model, save_model

SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>")
TRAINING_SEED = 1_000
ALIKE = (r": (?=\{)", r"\}\} -> \{", r"\}, ", r"\"\}")
"""What stands around a call in a log or an answer is cut off, so that the call itself has the same tokens in both."""
CONTEXT = 512
ASKS = 3
STAGES = (1, 2)
"""Most steps of a log in each stage: to copy one comes before to find one of two."""
STEPS = (240, 400)
"""Of the optimizer, in each stage."""
LENGTH = 154
"""Of the evaluation: 96 tokens are room for the answer, the rest holds a log of two steps."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench-agents"))
    parser.add_argument(
        "--steps", type=int, nargs=2, default=STEPS, help="optimizer steps of 2,048 tokens, by stage"
    )
    parser.add_argument("--samples", type=int, default=100, help="of each of two depths")
    arguments = parser.parse_args()
    found = run_chain(arguments.out, steps=tuple(arguments.steps), samples=arguments.samples)
    print(render(found))


def run_chain(out: Path, *, steps: tuple[int, int] = STEPS, samples: int) -> dict[str, Any]:
    """Fetch, look at, tokenise, audit, train, evaluate and report below `out`; returns what was found."""
    seconds: dict[str, float] = {}
    hub = out / "hub"
    (hub / "data").mkdir(parents=True, exist_ok=True)
    texts = []
    for most, count in zip(STAGES, steps, strict=True):
        records = [trace(number, most) for number in range(max(40, 6 * count))]
        lines = [json.dumps(record) + "\n" for record in records]
        (hub / "data" / f"steps-{most}.jsonl").write_text("".join(lines))
        texts += [turn["content"] for record in records[:600] for turn in record["messages"]]
    tokenizer = train_tokenizer(texts, out / "tokenizer")
    base = {
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    save_model(build_model(base, seed=0, init="zero_residual"), out / "base")
    (out / "recipe.yaml").write_text(yaml.safe_dump({"data_root": str(out.resolve()), **recipe(steps)}))

    def command(name: str, *words: object) -> str:
        begun = time.monotonic()
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        seconds[name] = time.monotonic() - begun
        assert result.exit_code == 0, result.output
        return result.stdout

    written = ("--tokenizer", out / "tokenizer", "--chat-template", "qwen-3")
    command("fetch", "data", "fetch", hub, "--out", out / "traces")
    traces = out / "traces" / "data"
    look = command("data chat", "data", "chat", traces, *written, "--true-prefixes", "--json")
    for most in STAGES:
        command(
            f"tokenise {most}", "data", "tokenize", traces / f"steps-{most}.jsonl", "--out", out / f"store-{most}",
            *written, "--messages-field", "messages", "--conversations", "true_prefixes=true",
        )  # fmt: skip
    command("audit", "data", "audit", *(out / f"store-{most}" for most in STAGES), "--out", out / "audit")
    command("train", "train", out / "recipe.yaml", "--out", out / "run")
    for label, model in (("before", out / "base"), ("after", out / "run" / "stages" / f"steps-{STAGES[-1]}")):
        command(
            f"evaluate {label}", "eval", "tool_calls", "--model", model, *written, "--thinking", "off",
            "--lengths", LENGTH, "--depths", "0,1", "--samples", samples, "--label", label, "--out", out / "run",
        )  # fmt: skip
    command("report", "report", out / "run", "--out", out / "report.html")
    return {
        "learnt": json.loads(look)["learnt"],
        "steps": steps,
        "samples": 2 * samples,
        "right": {label: right(out / "run", label) for label in ("before", "after")},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def trace(number: int, most: int) -> dict[str, Any]:
    """Return a conversation on a log of at most so many steps: some of them are asked for, in any order."""
    draw = random.Random(f"{number} {most}")
    history = History(TRAINING_SEED, most, number)
    steps = draw.randint(1, most)
    turns: list[dict[str, Any]] = []
    for ask in range(ASKS):
        step = draw.randint(1, steps)
        log = "" if ask else INTRODUCTION + history.text(steps)
        turns.append({"role": "user", "content": f"{log}{QUESTION.format(step=step)}{FORM}"})
        turns.append({"role": "assistant", "content": json.dumps(history.step(step))})
    return {"messages": turns, "chat_template_kwargs": {"enable_thinking": False}}


def train_tokenizer(texts: list[str], folder: Path) -> Tokenizer:
    """Train BPE on the traces: what all of them say becomes few tokens; made-up words are cut into their syllables,
    and numbers into groups of three digits."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    keys = {*(name for names in TOOLS.values() for name in names[:1]), "result"}
    syllables = [f'(?<={key}": "{before}).[aeiou]' for key in sorted(keys) for before in ("", "..", "....")]
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join([*ALIKE, "[0-9]{1,3}", *syllables])), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = [str(number) for number in range(1000)]
    model.train_from_iterator([*texts, *numbers, "user\n", "assistant\n", "<think>\n\n</think>\n\n"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return load_tokenizer(folder)


def recipe(steps: tuple[int, int]) -> dict[str, Any]:
    """Return the training: rows of 512 tokens, four to an optimizer step, answers alone."""
    stages = [
        {
            "name": f"steps-{most}",
            "objective": "sft",
            "context_length": CONTEXT,
            "steps": count,
            "max_epochs": 100,
            "batch_tokens": 4 * CONTEXT,
            "lr": 0.02,
            "adamw_lr": 0.004,
            "lr_schedule": schedule,
            "optimizer_state": state,
            "streams": {"traces": {"store": f"store-{most}"}},
        }
        for most, count, schedule, state in zip(
            STAGES,
            steps,
            (
                {"kind": "constant", "warmup_steps": 10},
                {"kind": "linear", "decay_fraction": 0.8, "floor": 0.05},
            ),
            ("fresh", "carry"),
            strict=True,
        )
    ]
    return {
        "seed": 0,
        "tokenizer": "tokenizer",
        "model": {"path": "base"},
        "optimizer": {"name": "muon", "betas": [0.9, 0.98]},
        "checkpoint": {"every_steps": 10_000},
        "stages": stages,
    }


def right(run: Path, label: str) -> dict[str, float]:
    """Return the share of right answers with its 95 % interval (Wilson)."""
    samples = [
        record for record in read_jsonl(run / "records" / f"tool_calls-{label}.jsonl") if "score" in record
    ]
    scores = [float(record["score"]) for record in samples]
    interval = wilson_interval(sum(scores), len(scores))
    assert interval is not None, "there are samples"
    return {
        "share": sum(scores) / len(scores),
        "low": interval[0],
        "high": interval[1],
        "samples": len(scores),
    }


def render(found: dict[str, Any]) -> str:
    """Return the figures as markdown."""
    lines = ["| | right | 95 % | samples |", "|---|---|---|---|"]
    for label, share in found["right"].items():
        lines.append(
            f"| {label} | {share['share']:.2f} | {share['low']:.2f} to {share['high']:.2f} | {share['samples']} |"
        )
    lines += ["", "| step of the chain | seconds |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in found["seconds"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
