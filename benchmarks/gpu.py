"""Attention, virtual rings, loss, MLP and checkpointing on one GPU.

    python benchmarks/gpu.py --out gpu.json --markdown gpu_table.md      everything, at most nine minutes
    python benchmarks/gpu.py --ladder                                    correctness, then the longest rows that fit
    python benchmarks/gpu.py --only attention,zigzag
    python benchmarks/gpu.py --dry-run                                   tiny sizes on CPU: does it run?

Without longspan installed: PYTHONPATH=src python benchmarks/gpu.py. Needs torch >= 2.11, numpy and, for one section,
transformers >= 5.17. Times are medians between CUDA events after a warm-up; memory is the allocator's peak beyond
what was held before. A case that fails is a row with its error. Each section runs in a process of its own, so that
neither a broken CUDA context nor a hang takes the others with it, and rows are written as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from gpu_attention import attention, correctness, zigzag
from gpu_ladder import LADDER
from gpu_measure import DRY, FAILURES, FULL, Deadline, Row, Scale
from gpu_memory import checkpointing, loss, tiled_mlp
from longspan.core.files import atomic_write, write_json
from longspan.core.log import setup_logging
from longspan.core.records import JsonlWriter, read_jsonl

Section = tuple[Callable[[Scale, Deadline], Iterator[Row]], float]
"""What makes the rows, and the seconds after which no further case of it begins."""

SECTIONS: dict[str, Section] = {
    "correctness": (correctness, 40.0),
    "zigzag": (zigzag, 80.0),
    "attention": (attention, 260.0),
    "loss": (loss, 35.0),
    "tiled_mlp": (tiled_mlp, 35.0),
    "checkpointing": (checkpointing, 50.0),
}
"""What runs, in this order."""

GRACE_SECONDS = 40.0
"""For the start of a section and the case in progress when its time is up."""

TOTAL_SECONDS = 530.0


def machine(*, dry_run: bool) -> Row:
    """Return what the figures depend on."""
    row: Row = {
        "section": "machine",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "device": "CPU, tiny sizes, fp32: no figures" if dry_run else "none",
    }
    if not dry_run and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        row["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return row


def run_section(name: str, made: Section | None, rows_path: str, dry_run: bool, seconds: float) -> None:
    """Append the rows of one section, in a process of its own; None: what describes the machine."""
    setup_logging()
    writer = JsonlWriter(rows_path)
    if made is None:
        writer.write(machine(dry_run=dry_run))
        return
    section, own_seconds = made
    deadline = Deadline(name, min(own_seconds, seconds))
    try:
        for row in section(DRY if dry_run else FULL, deadline):
            row = {key: _finite(value) for key, value in row.items() if value is not None}
            writer.write(row)
            print(f"  {json.dumps(row)}", file=sys.stderr, flush=True)
    except FAILURES as error:
        # Between cases: what the section prepares for all of them.
        writer.write({"section": name, "error": f"{type(error).__name__}: {error}"[:240]})
    finally:
        writer.close()


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def isolate(name: str, made: Section | None, rows_path: Path, *, dry_run: bool, seconds: float) -> None:
    """Run one section in a child process; what ends it is a row."""
    # Forked, because torch is imported already. This process never touches CUDA, so its children may.
    child = multiprocessing.get_context("fork").Process(
        target=run_section, args=(name, made, str(rows_path), dry_run, seconds)
    )
    child.start()
    child.join(seconds + GRACE_SECONDS)
    reason = None
    if child.is_alive():
        child.kill()
        child.join()
        reason = f"stopped after {seconds + GRACE_SECONDS:.0f} s"
    elif child.exitcode:
        reason = f"the process ended with exit code {child.exitcode}"
    if reason is not None:
        writer = JsonlWriter(rows_path)
        writer.write({"section": name, "error": reason})
        writer.close()


def markdown(rows: list[Row]) -> str:
    """Return one table per section."""
    parts = []
    for name in dict.fromkeys(row["section"] for row in rows):
        own = [{k: v for k, v in row.items() if k != "section"} for row in rows if row["section"] == name]
        own.sort(key=lambda row: row.get("tokens", 0))
        columns = [key for key in dict.fromkeys(key for row in own for key in row) if key != "error"]
        if any("error" in row for row in own):
            columns.append("error")
        lines = [f"## {name}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in own]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            f"{value:.2e}"
            if 0 < abs(value) < 0.01
            else f"{value:.3g}"
            if abs(value) < 100
            else f"{value:.0f}"
        )
    return str(value).replace("|", "\\|")


def run_all(sections: dict[str, Section], *, out: Path | None, table: Path | None, dry_run: bool) -> None:
    """Run sections one after another, print their tables and write what was asked for."""
    end = time.monotonic() + TOTAL_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        # Beside the result, so that a machine that is taken away leaves what was measured.
        rows_path = Path(folder) / "rows.jsonl" if out is None else out.with_suffix(".rows.jsonl")
        rows_path.unlink(missing_ok=True)
        isolate("machine", None, rows_path, dry_run=dry_run, seconds=30)
        if next(read_jsonl(rows_path)).get("device", "none") == "none":
            sys.exit("torch sees no CUDA device here; --dry-run runs tiny sizes on CPU")
        for name, section in sections.items():
            seconds = max(0.0, min(section[1], end - GRACE_SECONDS - time.monotonic()))
            print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
            isolate(name, section, rows_path, dry_run=dry_run, seconds=seconds)
        rows = list(read_jsonl(rows_path))
        text = markdown(rows)
        print(text)
        if out is not None:
            write_json(out, {"rows": rows})
            rows_path.unlink()
        if table is not None:
            with atomic_write(table) as file:
                file.write(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every row as JSON")
    parser.add_argument("--markdown", type=Path, help="write the tables, which are printed anyway")
    parser.add_argument("--only", help="sections, separated by commas; default: all")
    parser.add_argument(
        "--ladder", action="store_true",
        help="instead: correctness in bf16, FlashAttentions, training at 8K to 1M tokens, decoding, a needle grid",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU")
    options = parser.parse_args()
    sections = {"correctness": SECTIONS["correctness"], **LADDER} if options.ladder else SECTIONS
    names = list(sections) if options.only is None else options.only.split(",")
    if unknown := [name for name in names if name not in sections]:
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(sections)}")
    run_all(
        {name: sections[name] for name in names},
        out=options.out,
        table=options.markdown,
        dry_run=options.dry_run,
    )


if __name__ == "__main__":
    main()
