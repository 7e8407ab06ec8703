"""The simulation to 1,024 GPUs and 16M tokens: tables, a plot, and how far it is from published rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from longspan.core.mesh_config import MeshConfig
from longspan.plan import scale as simulation
from longspan.plan.hardware import GPUS
from longspan.plan.models import MODELS
from longspan.plan.scale import arrangement_name, attention_seconds
from offloaded_step import Step, best_steps

CONTEXTS = [2**power for power in range(17, 25)]
NUM_GPUS = [2**power for power in range(3, 11)]
BATCH_TOKENS = 2**22
TIE = 0.01
"""Schedules within this share of the fastest are as good as it: the model is not better than that."""
SCHEDULES = ("none", "ulysses", "all_gather", "usp", "ring", "dist_flash")
COLOURS = {
    "none": "#667085",
    "ulysses": "#0f766e",
    "all_gather": "#b45309",
    "usp": "#4338ca",
    "ring": "#be185d",
    "dist_flash": "#64a30d",
}


class Cell(NamedTuple):
    """All schedules at one context and number of GPUs; the fastest first, impossible ones last."""

    steps: list[Step]

    @property
    def best(self) -> Step | None:
        return self.steps[0] if self.steps[0].limit is None else None

    @property
    def ties(self) -> list[Step]:
        """Other schedules that are as good."""
        assert self.best is not None
        limit = self.best.seconds * (1 + TIE)
        return [step for step in self.steps[1:] if step.limit is None and step.seconds <= limit]


def cell(model: str, gpu: str, context: int, num_gpus: int) -> Cell:
    """Simulate every schedule."""
    steps = best_steps(
        MODELS[model], GPUS[gpu], context=context, num_gpus=num_gpus, batch_tokens=BATCH_TOKENS
    )
    return Cell(sorted(steps.values(), key=lambda step: (step.limit is not None, step.seconds)))


def grid(model: str, gpu: str) -> dict[tuple[int, int], Cell]:
    """Simulate every context and number of GPUs."""
    return {(c, n): cell(model, gpu, c, n) for c in CONTEXTS for n in NUM_GPUS}


def winners_table(cells: dict[tuple[int, int], Cell]) -> str:
    """Return a table: the fastest arrangement, seconds a step, MFU; `+n` schedules are as good."""
    lines = ["| context | " + " | ".join(f"{n:,}" for n in NUM_GPUS) + " |"]
    lines.append("|---:|" + "---|" * len(NUM_GPUS))
    for context in CONTEXTS:
        texts = [_cell_text(cells[context, num_gpus]) for num_gpus in NUM_GPUS]
        lines.append(f"| {length_text(context)} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _cell_text(found: Cell) -> str:
    best = found.best
    if best is None:
        return f"impossible: {found.steps[0].limit}"
    ties = f" +{len(found.ties)}" if found.ties else ""
    return f"{arrangement_name(best.parallel)}{ties}, {_seconds_text(best.seconds)} s, {best.mfu:.0%}"


def _seconds_text(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def schedules_table(cells: dict[tuple[int, int], Cell], places: list[tuple[int, int]]) -> str:
    """Return a table of every schedule at chosen places."""
    lines = [
        "| context | GPUs | schedule | s a step | MFU | waits for communication | device GB | host GB | |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for context, num_gpus in places:
        for step in cells[context, num_gpus].steps:
            memory = f"{step.memory.device / 1e9:.0f} | {step.memory.host / 1e9:.0f}"
            lines.append(
                f"| {length_text(context)} | {num_gpus:,} | {arrangement_name(step.parallel)} "
                f"| {_seconds_text(step.seconds)} "
                f"| {step.mfu:.1%} | {step.exposed:.1%} | {memory} "
                f"| {'too little ' + step.limit if step.limit else ''} |"
            )
    return "\n".join(lines)


M = 2**20
ASSUMED = {"LINK_EFFICIENCY": (0.6, 0.9), "HALF_ROWS": (256, 1024)}
"""Other values of what the simulation assumes."""


def sensitivity_table() -> str:
    """Return how many of the cells each schedule wins when an assumption changes."""
    names = (*SCHEDULES, "nothing fits")
    lines = ["| assumption | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for name, value in [("as it is", 0.0), *((key, value) for key in ASSUMED for value in ASSUMED[key])]:
        with patch.object(simulation, name, value) if value else nullcontext():
            cells = grid("llama-3-8b", "h100")
        bests = [found.best for found in cells.values()]
        wins = Counter("nothing fits" if best is None else best.parallel.schedule_name for best in bests)
        text = f"{name} {value}" if value else name
        lines.append(f"| {text} | " + " | ".join(str(wins[schedule]) for schedule in names) + " |")
    return "\n".join(lines)


RING_ATTENTION = {"contiguous ring": 0.54, "ring": 0.90, "striped": 0.83}
"""ring-flash-attention, 8 H800, 8K tokens a GPU, 32 heads, 8 key/value heads of 128: share of ideal flash speed."""


def ring_table() -> str:
    """Return predicted against published speed of ring attention alone, forward and backward."""
    model, gpu = MODELS["llama-3-8b"], GPUS["h800"]

    def both(parallel: MeshConfig, context: int) -> float:
        return sum(
            attention_seconds(model, gpu, parallel, context=context, backward=back)[0]
            for back in (False, True)
        )

    ideal = 8 * both(MeshConfig(), 2**13)
    lines = ["| attention alone, 8 H800 | published | predicted |", "|---|---:|---:|"]
    for name, published in RING_ATTENTION.items():
        schedule = "striped" if name == "striped" else "ring"
        share = ideal / both(MeshConfig.of_schedule(schedule, 8), 2**16)
        if name == "contiguous ring":
            # Half a block, then 7 steps in which somebody has a whole one; balanced, it would be 8 halves.
            share *= 8 / (1 + 2 * 7)
        lines.append(f"| {name} | {published:.0%} | {share:.0%} |")
    return "\n".join(lines)


def draw(cells: dict[tuple[int, int], Cell], model: str, gpu: str, path: Path) -> None:
    """Draw who wins where, and MFU of every schedule over the number of GPUs at three contexts."""
    figure = Figure(figsize=(13, 8.2), dpi=110, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    _draw_winners(top.subplots(), cells, f"{model} on {gpu.upper()}: the fastest schedule, and its MFU")
    lines = bottom.subplots(1, 3, sharey=True)
    for axes, context in zip(lines, (2**17, 2**20, 2**24)):
        _draw_lines(axes, cells, context)
    lines[0].set_ylabel("MFU of the best arrangement")
    handles, labels = lines[1].get_legend_handles_labels()
    bottom.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    with path.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})


def _draw_winners(axes: Axes, cells: dict[tuple[int, int], Cell], title: str) -> None:
    for (context, num_gpus), found in cells.items():
        x, y = NUM_GPUS.index(num_gpus), CONTEXTS.index(context)
        best = found.best
        colour = "#eceff3" if best is None else COLOURS[best.parallel.schedule_name]
        axes.add_patch(_rectangle(x, y, colour))
        text = (
            "does not fit"
            if best is None
            else f"{arrangement_name(best.parallel)}\n{best.mfu:.0%}"
            + (f"   (+{len(found.ties)} tied)" if found.ties else "")
        )
        axes.text(
            x, y, text, ha="center", va="center", fontsize=8.5, color="#475467" if best is None else "white"
        )
    axes.set(xlim=(-0.5, len(NUM_GPUS) - 0.5), ylim=(-0.5, len(CONTEXTS) - 0.5), title=title)
    axes.set_xticks(range(len(NUM_GPUS)), [f"{n:,}" for n in NUM_GPUS])
    axes.set_yticks(range(len(CONTEXTS)), [length_text(context) for context in CONTEXTS])
    axes.set(xlabel="GPUs", ylabel="context, tokens")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _rectangle(x: int, y: int, colour: str) -> Rectangle:
    return Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, color=colour, linewidth=0)


def _draw_lines(axes: Axes, cells: dict[tuple[int, int], Cell], context: int) -> None:
    for schedule in SCHEDULES:
        points = list(_points(cells, schedule, context))
        axes.plot(
            [n for n, _ in points],
            [mfu for _, mfu in points],
            marker="o",
            markersize=4,
            label=schedule,
            color=COLOURS[schedule],
        )
    axes.set(
        title=f"{length_text(context)} tokens", xlabel="GPUs", xscale="log", ylim=(0, 0.4), xlim=(7, 1200)
    )
    axes.xaxis.set_major_locator(FixedLocator(NUM_GPUS))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{n:,}" for n in NUM_GPUS]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#e3e6eb")
    axes.spines[["top", "right"]].set_visible(False)


def _points(cells: dict[tuple[int, int], Cell], schedule: str, context: int) -> Iterator[tuple[int, float]]:
    for num_gpus in NUM_GPUS:
        for step in cells[context, num_gpus].steps:
            if step.parallel.schedule_name == schedule and step.limit is None:
                yield num_gpus, step.mfu


def length_text(tokens: int) -> str:
    """Write a context length: 131072 is 128K."""
    return f"{tokens // M}M" if tokens % M == 0 else f"{tokens // 1024}K"
