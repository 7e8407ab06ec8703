"""`longspan doctor --certify`: run the certificate of context parallelism and show it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from longspan.cli.output import print_json, print_table
from longspan.core.errors import ArgumentError
from longspan.core.progress import progress
from longspan.core.units import format_bytes

if TYPE_CHECKING:
    from longspan.parallel.certify import CertifyResult

Result = TypeVar("Result")

TIMEOUT_SECONDS = 1800.0
"""For one world; thousands of small collectives take minutes when processes share a core."""

Half = dict[str, dict[int, list[float]]]
"""bf16 error by schedule, world and seed."""


def certify_schedules(schedules: str, worlds: str, *, as_json: bool) -> bool:
    """Run and print the certificate; return whether everything that can be holds.

    Raises:
        ArgumentError: an unknown schedule or no number of processes.
        RunError: a process failed.
    """
    from longspan.parallel.certify import HALF_GROWTH_LIMIT, certify_world, half_growth

    results: list[CertifyResult] = []
    half: Half = defaultdict(dict)
    ran, first = in_worlds(certify_world, worlds, schedule_names(schedules))
    for size, (cells, errors) in ran.items():
        results += cells
        for name, by_seed in errors.items():
            half[name][size] = by_seed
    growth = {name: half_growth(by_world) for name, by_world in half.items() if len(by_world) > 1}
    passed = all(result.passed is not False for result in results)
    passed = passed and all(value <= HALF_GROWTH_LIMIT for value in growth.values())
    if first:
        (_print_json if as_json else _print)(results, half, growth, passed)
    return passed


def in_worlds(certify: Callable[..., Result], worlds: str, *asked: Any) -> tuple[dict[int, Result], bool]:
    """Return what `certify(rank, *asked, device type)` returns on every number of processes, and whether to print it.

    Under a launcher its processes are the only world.

    Raises:
        ArgumentError: no number of processes.
        RunError: a process failed.
    """
    from longspan.parallel.launch import process_group, spawn_local

    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        import torch.distributed as dist

        with process_group(timeout_seconds=TIMEOUT_SECONDS) as device:
            return {
                dist.get_world_size(): certify(dist.get_rank(), *asked, device.type)
            }, dist.get_rank() == 0
    ran = {}
    sizes = _worlds(worlds)
    with progress("certify", total=sum(sizes), unit="processes") as bar:
        for size in sizes:
            bar.note(f"{size} processes")
            # Every rank returns the same.
            ran[size] = spawn_local(certify, size, *asked, timeout_seconds=TIMEOUT_SECONDS)[0]
            bar.advance(size)
    return ran, True


def schedule_names(schedules: str) -> list[Any]:
    """Return the context-parallel schedules of an option. Raises ArgumentError for an unknown one."""
    from longspan.parallel.schedules import SCHEDULES

    known = [name for name in SCHEDULES if name != "none"]
    names = known if schedules == "all" else [name.strip() for name in schedules.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ArgumentError(
            "unknown context-parallel schedule", found=", ".join(unknown), allowed="all, " + ", ".join(known)
        )
    return names


def _worlds(worlds: str) -> list[int]:
    words = [word.strip() for word in worlds.split(",")]
    if not all(word.isdecimal() and int(word) >= 2 for word in words):
        raise ArgumentError(
            "--world takes numbers of processes", found=worlds, allowed="numbers from 2, such as 2,3,4,8"
        )
    return sorted({int(word) for word in words})


def _print_json(results: list[CertifyResult], half: Half, growth: dict[str, float], passed: bool) -> None:
    cells = [
        {
            **dict(_details(result)),
            "passed": result.passed,
            "reason": result.reason or None,
            "fast_dtype": result.fast_dtype or None,
        }
        for result in results
    ]
    print_json({"passed": passed, "cells": cells, "half_error": half, "half_growth": growth})


def _print(results: list[CertifyResult], half: Half, growth: dict[str, float], passed: bool) -> None:
    from longspan.parallel.certify import EXACT_LIMIT, FAST_LIMITS, HALF_GROWTH_LIMIT

    groups: dict[tuple[int, str, str, str], list[CertifyResult]] = defaultdict(list)
    for result in results:
        groups[result.world, result.cell.schedule, result.cell.degrees, result.cell.layout].append(result)
    rows = []
    for (world, name, degrees, layout), cells in groups.items():
        ran = [cell for cell in cells if cell.passed is not None]
        missing = f"{len(cells) - len(ran)} n/a" if len(ran) < len(cells) else ""
        failed = sum(cell.passed is False for cell in ran)
        rows.append(
            [
                world,
                name,
                degrees,
                layout,
                len(ran) - failed,
                failed,
                missing or None,
                _worst(cell.exact_error for cell in ran),
                _worst(cell.fast_forward_error for cell in ran),
                _worst(cell.fast_gradient_error for cell in ran),
                sum(cell.leaks for cell in ran) if ran else None,
                format_bytes(max(cell.sent_bytes for cell in ran)) if ran else None,
            ]
        )
    # One kernel, and so one type, for all cells that ran.
    dtype = next((result.fast_dtype for result in results if result.fast_dtype), "float32")
    columns = (
        "world", "schedule", "ring x ulysses", "layout", "passed", "failed", "n/a", "fp64 max", f"{dtype} out",
        f"{dtype} gradients", "leaks", "sent, most",
    )  # fmt: skip
    limits = FAST_LIMITS[dtype]
    title = (
        f"against one device in fp64; limits: fp64 {EXACT_LIMIT:g}, {dtype} {limits.forward:g} and "
        f"{limits.gradient:g}, leaks 0"
    )
    print_table(title, columns, rows)
    _print_impossible(results)
    for result in results:
        if result.passed is False:
            print_table(f"FAILED on {result.world} processes", ("what", "value"), _details(result))
    sizes = sorted({world for by_world in half.values() for world in by_world})
    rows = [
        [
            name,
            *(_mean(by_world.get(size)) for size in sizes),
            f"{growth[name]:.3f}" if name in growth else None,
        ]
        for name, by_world in half.items()
    ]
    print_table(
        f"bf16 error, RMS against fp64; growth at most {HALF_GROWTH_LIMIT}",
        ("schedule", *(f"{size} processes" for size in sizes), "growth"),
        rows,
    )
    verdict = "everything holds" if passed else "NOT everything holds"
    count = sum(result.passed is not None for result in results)
    print_table(f"{verdict}: {count} cells, forward and backward", (), ())


def _print_impossible(results: list[CertifyResult]) -> None:
    reasons: dict[tuple[int, str, str], list[CertifyResult]] = defaultdict(list)
    for result in results:
        if result.reason:
            reasons[result.world, result.cell.schedule, result.reason].append(result)
    if reasons:
        print_table(
            "n/a",
            ("world", "schedule", "cells", "reason"),
            [[world, name, len(cells), reason] for (world, name, reason), cells in reasons.items()],
        )


def _details(result: CertifyResult) -> list[tuple[str, object]]:
    values = {**result.cell._asdict(), **result._asdict()}
    return [(name, value) for name, value in values.items() if name != "cell"]


def _worst(errors: Any) -> str | None:
    worst = max(errors, default=None)
    return None if worst is None else f"{worst:.1e}"


def _mean(errors: list[float] | None) -> str | None:
    return None if errors is None else f"{sum(errors) / len(errors):.2e}"
