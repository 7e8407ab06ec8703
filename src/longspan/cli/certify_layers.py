"""`longspan doctor --certify --layers`: run the certificate of layers with a state and show it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from longspan.cli.certify import in_worlds, schedule_names
from longspan.cli.output import print_json, print_table
from longspan.core.errors import ArgumentError

if TYPE_CHECKING:
    from longspan.models.certify_layers import LayerResult


def certify_state_layers(layers: str, schedules: str, worlds: str, *, as_json: bool) -> bool:
    """Run and print the certificate; return whether everything that can be holds.

    Raises:
        ArgumentError: an unknown kind of layer or schedule, or no number of processes.
        RunError: a process failed.
    """
    from longspan.models.certify_layers import LAYER_KINDS, certify_layers

    kinds = list(LAYER_KINDS) if layers == "all" else [name.strip() for name in layers.split(",")]
    if unknown := [name for name in kinds if name not in LAYER_KINDS]:
        raise ArgumentError(
            "unknown kind of layer", found=", ".join(unknown), allowed="all, " + ", ".join(LAYER_KINDS)
        )
    ran, first = in_worlds(certify_layers, worlds, kinds, schedule_names(schedules))
    results = [result for found in ran.values() for result in found]
    passed = all(result.passed is not False for result in results)
    if first and as_json:
        cells = [
            {**result._asdict(), "passed": result.passed, "reason": result.reason or None}
            for result in results
        ]
        print_json({"passed": passed, "cells": cells})
    elif first:
        _print(results, passed)
    return passed


def _print(results: list[LayerResult], passed: bool) -> None:
    from longspan.models.certify_layers import LIMIT

    groups: dict[tuple[int, str, str, str], list[LayerResult]] = defaultdict(list)
    for result in results:
        groups[result.world, result.layer, result.schedule, result.degrees].append(result)
    rows = []
    for (world, layer, name, degrees), cells in groups.items():
        ran = [cell for cell in cells if cell.passed is not None]
        rows.append([
            world, layer, name, degrees, ", ".join(cell.layout for cell in ran) or cells[0].reason,
            sum(bool(cell.passed) for cell in ran), sum(cell.passed is False for cell in ran),
            f"{max(cell.loss_error for cell in ran):.1e}" if ran else None,
            f"{max(cell.gradient_error for cell in ran):.1e}" if ran else None,
            sum(cell.leaks for cell in ran) if ran else None,
        ])  # fmt: skip
    columns = (
        "world", "layer", "schedule", "ring x ulysses", "layouts", "passed", "failed", "loss", "gradients", "leaks"
    )  # fmt: skip
    title = f"against each document alone on one device, fp32; limit {LIMIT:g}, leaks 0"
    print_table(title, columns, rows)
    verdict = "everything holds" if passed else "NOT everything holds"
    print_table(f"{verdict}: {sum(result.passed is not None for result in results)} cells", (), ())
