"""Training speed and memory beside the Hugging Face Trainer and TRL's SFTTrainer: same model, documents, machine.

    python benchmarks/train.py --peers peers/bin/python           the tables of train.md, about an hour
    python benchmarks/train.py --only memory --peers ...          a part; without --peers only our side
    python benchmarks/train.py --dry-run                          tiny sizes: does it run?
    python benchmarks/train.py --gpu --out gpu_train.json         blocks of Llama-3-8B's shape on one GPU

On CPU every process is pinned to `--threads` cores and computes in fp32. Each configuration of each tool runs once;
the fastest one of each that makes the same steps then takes turns with the others', `--rounds` times, and medians
over all steps are compared. A run whose losses differ from ours by more than 1e-4 in any step, though its documents
are the same, ends the benchmark with exit code 1. Tables go to stdout, numbers to WORK/results.json.

The peers live in an environment of their own (TRL 1.16 works with this transformers):

    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from data_measure import Failed, Numbers, finish, machine, start
from train_data import DRY, FULL, LR, Inputs, Sizes, prepare, recipe
from train_tables import LOSS_TOLERANCE, render

HERE = Path(__file__).parent
SPEED = (("15M, 32K words", "mixed"), ("15M, 32K words", "equal"), ("0.5M, 1K words", "mixed"))
MEMORY = ("15M, 128K words", "mixed")
PARTS = ("speed", "memory")


class Configuration(NamedTuple):
    """One way to have a tool do the work."""

    tool: str
    """longspan, transformers or trl."""
    name: str
    settings: dict[str, Any]
    same_steps: bool = True
    """Whether its steps are made of the same documents, and documents do not see each other."""
    returning: bool = False
    """Whether glibc is told to return every freed block of 1 MiB at once; by itself it keeps what is below 32 MiB."""


def _padded(tool: str, count: int) -> Configuration:
    """What group_by_length makes of the documents of a step: sorted, then padded some at a time."""
    return Configuration(tool, f"padded, sorted, {count} at a time", {"sorted": True, "batch": count})


def _flat(tool: str, count: int) -> Configuration:
    """Documents end to end, with positions that start again: transformers makes a mask of blocks of them."""
    name = "padding_free" if tool == "trl" else "flattened"
    return Configuration(tool, f"{name}, {count} at a time", {"flat": True, "batch": count})


def _checkpointed(other: Configuration) -> Configuration:
    """Every block computed again in the backward pass."""
    settings = other.settings | {"checkpointing": True}
    return other._replace(name=f"{other.name}, checkpointed", settings=settings)


def _returning(other: Configuration) -> Configuration:
    return other._replace(name=f"{other.name}, memory returned", returning=True)


OWN = [
    Configuration("longspan", "1 row at a time", {"rows_per_micro_batch": 1}),
    Configuration("longspan", "2 rows at a time", {"rows_per_micro_batch": 2}),
    Configuration(
        "longspan", "1 row at a time, compiled blocks", {"rows_per_micro_batch": 1, "compile_blocks": True}
    ),
    Configuration(
        "longspan", "2 rows at a time, compiled blocks", {"rows_per_micro_batch": 2, "compile_blocks": True}
    ),
]
HUGGING_FACE = [
    *(_padded("transformers", count) for count in (1, 2, 4, 8)),
    *(_flat("transformers", count) for count in (2, 4, 16)),
    Configuration("transformers", "padded, as drawn, 4 at a time", {"batch": 4}),
    Configuration(
        "transformers",
        "padded, sorted, 1 at a time, torch.compile",
        {"sorted": True, "batch": 1, "compile": True},
    ),
    Configuration(
        "transformers",
        "group_by_length, 4 at a time",
        {"batch": 4, "sampling": "group_by_length"},
        same_steps=False,
    ),
]
TRL = [
    *(_padded("trl", count) for count in (1, 2, 4, 8)),
    *(_flat("trl", count) for count in (2, 4, 16)),
    Configuration("trl", "packing=True, bfd", {"packing": "bfd", "batch": 1}, same_steps=False),
    Configuration("trl", "packing=True, wrapped", {"packing": "wrapped", "batch": 1}, same_steps=False),
]
PACKED = [OWN[0], _checkpointed(OWN[0]), _flat("transformers", 16), _checkpointed(_flat("transformers", 16))]
MEMORY_CONFIGURATIONS = [
    *PACKED,
    *(_returning(each) for each in PACKED),
    _padded("transformers", 4),
    _padded("transformers", 1),
    _flat("trl", 16),
    _padded("trl", 1),
]
DRY_CONFIGURATIONS = [OWN[1], _padded("transformers", 4), _flat("transformers", 16), *TRL[-3:]]


class Setup(NamedTuple):
    """Where and how much; made once from the command line."""

    work: Path
    peers: str | None
    tools: tuple[str, ...]
    sizes: Sizes
    rounds: int
    threads: int
    dry_run: bool
    match: tuple[str, ...] = ()
    """Only configurations with one of these in their name; none: all."""


def run(setup: Setup, inputs: Inputs, configuration: Configuration, *, steps: int) -> Numbers:
    """Train by one configuration in a process of its own; return what it found, or the end of its message."""
    sizes, folder = setup.sizes, setup.work / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    own = configuration.tool == "longspan"
    case: Numbers = {
        "tool": configuration.tool,
        "threads": setup.threads,
        "run": str(folder / "run"),
        "work": str(setup.work),
        "result": str(folder / "result.json"),
    }
    if own:
        case["recipe"] = recipe(inputs, sizes, steps=steps, **configuration.settings)
    else:
        case |= {
            "model": str(inputs.model),
            "documents": str(inputs.documents),
            "steps": steps,
            "rows_per_step": sizes.rows_per_step,
            "row_tokens": sizes.row_tokens,
            "lr": LR,
            **configuration.settings,
        }
    (folder / "case.json").write_text(json.dumps(case))
    python = sys.executable if own or setup.peers is None else setup.peers
    script = HERE / ("train_own.py" if own else "train_peers.py")
    command = [python, str(script), str(folder / "case.json")]
    cores = sorted(os.sched_getaffinity(0))[-setup.threads :]
    threads = {
        "OMP_NUM_THREADS": str(setup.threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(setup.work / "hf"),
        **({"MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if configuration.returning else {}),
    }
    row = {"tool": configuration.tool, "name": configuration.name, "same_steps": configuration.same_steps}
    try:
        finish(start(command, cores=cores, env=threads), command)
        found = json.loads((folder / "result.json").read_text())
    except Failed as error:
        if own:
            raise
        return row | {"error": str(error).splitlines()[-1][:200], "said": str(error)}
    tokens = sizes.rows_per_step * sizes.row_tokens
    for clock in ("wall", "cpu"):
        row[f"tokens_per_{clock}_s"] = tokens / statistics.median(found[f"{clock}_s"])
    return row | found


def compare(row: Numbers, losses: list[float]) -> Numbers:
    """Add the largest difference of a step's loss from ours."""
    if "losses" not in row:
        return row
    difference = max(abs(a - b) for a, b in zip(row["losses"], losses))
    return row | {"difference": difference}


def speed(setup: Setup) -> list[Numbers]:
    """Run every configuration once, then the fastest of each tool in turns."""
    found = []
    for model, lengths in SPEED[:1] if setup.dry_run else SPEED:
        inputs = prepare(setup.work, model, lengths, setup.sizes, dry_run=setup.dry_run)
        scouts: list[Numbers] = []
        everything = DRY_CONFIGURATIONS if setup.dry_run else (*OWN, *HUGGING_FACE, *TRL)
        configurations = [
            c
            for c in everything
            if c.tool in setup.tools and (not setup.match or any(part in c.name for part in setup.match))
        ]
        for configuration in configurations:
            row = run(setup, inputs, configuration, steps=setup.sizes.scout_steps)
            scouts.append(compare(row, scouts[0]["losses"] if scouts else row["losses"]))
            _say(scouts[-1])
        best = [
            max(own, key=lambda pair: pair[1]["tokens_per_cpu_s"])[0]
            for tool in setup.tools
            if (own := [(c, r) for c, r in zip(configurations, scouts) if c.tool == tool and _counts(r)])
        ]
        turns: list[Numbers] = []
        for _ in range(setup.rounds):
            for configuration in best:
                row = run(setup, inputs, configuration, steps=setup.sizes.steps)
                turns.append(compare(row, turns[0]["losses"] if turns else row["losses"]))
                _say(turns[-1])
        found.append({"model": model, "lengths": lengths, "scouts": scouts, "turns": turns})
    return found


def _counts(row: Numbers) -> bool:
    return row["same_steps"] and row.get("difference", 1.0) <= LOSS_TOLERANCE


def memory(setup: Setup) -> list[Numbers]:
    """Peak memory with the vocabulary of Llama 3."""
    inputs = prepare(setup.work, *MEMORY, setup.sizes, dry_run=setup.dry_run)
    rows: list[Numbers] = []
    for configuration in MEMORY_CONFIGURATIONS:
        if configuration.tool in setup.tools:
            row = run(setup, inputs, configuration, steps=setup.sizes.memory_steps)
            rows.append(compare(row, rows[0]["losses"] if rows else row["losses"]))
            _say(rows[-1])
    return rows


def _say(row: Numbers) -> None:
    shown = {
        k: v
        for k, v in row.items()
        if k in ("tool", "name", "tokens_per_cpu_s", "difference", "peak_mib", "error")
    }
    print(json.dumps(shown), file=sys.stderr, flush=True)


def different(results: Numbers) -> list[str]:
    """Return the runs whose losses differ from ours though their steps are made of the same documents."""
    rows = [*results.get("memory", [])]
    for part in results.get("speed", []):
        rows += [*part["scouts"], *part["turns"]]
    return [
        f"{row['tool']}, {row['name']}: losses differ by {row['difference']:.1e}"
        for row in rows
        if row["same_steps"] and row.get("difference", 0.0) > LOSS_TOLERANCE
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", help="Python of the peers' environment")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--work", type=Path, default=Path("train-bench"))
    parser.add_argument(
        "--match", default="", help="of speed: only names with one of these parts, e.g. '2 rows;padded'"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on CPU")
    parser.add_argument("--gpu", action="store_true", help="the sections for one GPU instead")
    parser.add_argument("--out", type=Path, help="with --gpu: write every row as JSON")
    parser.add_argument(
        "--markdown", type=Path, help="with --gpu: write the tables, which are printed anyway"
    )
    options = parser.parse_args()
    if options.gpu:
        from train_gpu import run_sections

        run_sections(out=options.out, markdown=options.markdown, dry_run=options.dry_run)
        return
    parts = options.only.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    setup = Setup(
        work=options.work.absolute(),
        peers=options.peers,
        tools=("longspan", "transformers", "trl") if options.peers else ("longspan",),
        sizes=DRY if options.dry_run else FULL,
        rounds=1 if options.dry_run else options.rounds,
        threads=options.threads,
        dry_run=options.dry_run,
        match=tuple(part for part in options.match.split(";") if part),
    )
    setup.work.mkdir(parents=True, exist_ok=True)
    results: Numbers = {"machine": machine(None), "threads": setup.threads, "sizes": setup.sizes._asdict()}
    for part in parts:
        try:
            results[part] = {"speed": speed, "memory": memory}[part](setup)
        except Failed as error:
            sys.exit(f"{part}: {error}")
        (setup.work / "results.json").write_text(json.dumps(results, indent=1))
    print(render(results))
    if wrong := different(results):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
