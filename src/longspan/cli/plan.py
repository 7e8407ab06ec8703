"""`longspan plan`: which arrangement of GPUs trains a model at a context length fastest, before anything runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.output import Json, example, print_json, print_table

if TYPE_CHECKING:
    from longspan.cli.plan_model import Subject
    from longspan.plan.hardware import Gpu, GpuCount
    from longspan.plan.models import ModelShape
    from longspan.plan.search import Arrangement
    from longspan.plan.training_step import Adapters
    from longspan.train.probe import Probe

DEFAULT_BATCH = 4 << 20
EXAMPLE = example(
    "longspan plan llama-3-8b --context 512k --gpus 8xh100",
    "longspan plan llama-3-8b --context 80k --gpus a800 --qlora 32 --json",
    "longspan plan qwen3-30b-a3b --max-context --gpus 8xh200 --price 3.5",
    "longspan plan gemma-3-27b --mode infer --context 128k --gpus 2xl40s",
    "longspan plan recipe.yaml --context 8k --probe",
)


MODEL_HELP = (
    "A name such as llama-3-8b, one of the Hugging Face hub, a folder, a config.json, or a recipe: of that count its "
    "model, its adapters, and length and batch of its longest stage."
)
GPUS_HELP = (
    "How many of which GPU, such as 8xh100; 4x2xl40s for four nodes of two; "
    "'8x{like: h100, memory: 94e9}' for other figures; cpu for this machine's, which is measured."
)
MODE_HELP = "train; or infer: weights, keys and values, reading a prompt, answering."
CONTEXT_HELP = "Tokens of a sequence, such as 512k. Default: those of the recipe's longest stage."
MAX_CONTEXT_HELP = "Find the longest sequence that fits, and plan that."
BATCH_HELP = "Tokens of an optimizer step, one sequence at least. Default: the recipe's, else 4M."
LORA_HELP = "Train adapters of this rank, not the weights."
QLORA_HELP = "Train adapters of this rank beside weights in 4 bits."
KERNEL_HELP = "FlashAttention that is installed: fa2, fa3, fa4. Default: the one made for the GPU."
PRICE_HELP = "Money for one GPU and hour: what a billion tokens cost."
BUDGET_HELP = "With --price: how many tokens this money trains."
KV_HELP = "With --mode infer: how keys and values are stored; q8_0 and q4_0 are llama.cpp's."
WRITE_HELP = "Write the fastest that fits as the start of a recipe."
PROBE_HELP = (
    "Run a few steps of the recipe MODEL on this machine, in short rows, and correct time and memory by them. "
    "Without --gpus, this machine is planned."
)
EXPLAIN_HELP = "Show the formulas of the fastest with numbers and sources."


class KvType(StrEnum):
    """How a cache stores keys and values."""

    bfloat16 = "bfloat16"
    fp8 = "fp8"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class PlanMode(StrEnum):
    """What the GPUs are for."""

    train = "train"
    infer = "infer"


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    gpus: Annotated[str | None, typer.Option(help=GPUS_HELP)] = None,
    context: Annotated[str | None, typer.Option(help=CONTEXT_HELP)] = None,
    max_context: Annotated[bool, typer.Option("--max-context", help=MAX_CONTEXT_HELP)] = False,
    mode: Annotated[PlanMode, typer.Option(help=MODE_HELP)] = PlanMode.train,
    batch_tokens: Annotated[str | None, typer.Option(help=BATCH_HELP)] = None,
    lora: Annotated[int | None, typer.Option(min=1, help=LORA_HELP)] = None,
    qlora: Annotated[int | None, typer.Option(min=1, help=QLORA_HELP)] = None,
    kernel: Annotated[str | None, typer.Option(help=KERNEL_HELP)] = None,
    kv_dtype: Annotated[KvType | None, typer.Option(help=KV_HELP)] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help=PRICE_HELP)] = None,
    budget: Annotated[float | None, typer.Option(min=0.0, help=BUDGET_HELP)] = None,
    write: Annotated[Path | None, typer.Option(help=WRITE_HELP)] = None,
    explain: Annotated[bool, typer.Option("--explain", help=EXPLAIN_HELP)] = False,
    probe: Annotated[bool, typer.Option("--probe", help=PROBE_HELP)] = False,
    as_json: Json = False,
) -> None:
    """Estimate memory and time of a training step and show the fastest arrangement that fits; or of answering."""
    from longspan.cli.plan_model import find_subject
    from longspan.core.units import parse_tokens
    from longspan.plan.search import longest_context, search
    from longspan.plan.training_step import Adapters

    infers = mode is PlanMode.infer
    if infers:
        _refuse(
            "of training: --mode infer does not take it",
            lora=lora, qlora=qlora, batch_tokens=batch_tokens, price=price, budget=budget, write=write,
            probe=probe or None,
        )  # fmt: skip
    else:
        _refuse("it is of --mode infer", kv_dtype=kv_dtype)
    if probe or (gpus or "").strip().lower() == "cpu":
        _refuse("--probe and --gpus cpu measure this machine's attention as it is", kernel=kernel)
    _check(lora=lora, qlora=qlora, price=price, budget=budget)
    subject = find_subject(model)
    shape = subject.shape
    for note in subject.notes:
        typer.echo(note, err=True)
    tokens = _tokens(context, subject.context, max_context=max_context)
    batch = subject.batch_tokens or DEFAULT_BATCH if batch_tokens is None else parse_tokens(batch_tokens)
    rank = qlora or lora
    adapters = subject.adapters if rank is None else Adapters(rank, quantized=qlora is not None)
    # This may take minutes: what is wrong has been refused by now.
    probed: Probe | None = None
    if probe:
        (num_gpus, gpu), probed = _probed(model, gpus, rank)
    else:
        num_gpus, gpu = _machines(gpus, shape, adapters)
    if infers:
        _infer(shape, gpu, num_gpus, tokens, kernel, kv_dtype, as_json=as_json, explain=explain)
        return
    settings: dict[str, Any] = {
        "num_gpus": num_gpus, "batch_tokens": batch, "lora": adapters, "kernel": kernel,
    }  # fmt: skip
    if tokens is None:
        tokens = longest_context(shape, gpu, **settings)
    found = search(shape, gpu, context=tokens, **settings)
    if write is not None:
        _write(write, subject, found, tokens, adapters)
    money = [_money(each, num_gpus, price, budget) for each in found]
    if as_json:
        _print_as_json(shape, gpu, num_gpus, tokens, found, money, probed)
        return
    if probed is not None:
        _print_probe(probed)
    _print(f"{shape.name} at {tokens:,} tokens on {num_gpus} x {gpu.name}", gpu, found)
    if money and found[0].limit is None:
        for name, value in money[0].items():
            typer.echo(f"{name.replace('_', ' ')}: {value:,.2f}")
    if explain and found:
        from longspan.plan.explain import explain as explained

        lines = explained(shape, gpu, found[0], context=tokens, num_gpus=num_gpus, kernel=kernel)
        typer.echo("\n".join(lines))


def _print_as_json(
    shape: ModelShape,
    gpu: Gpu,
    num_gpus: int,
    tokens: int,
    found: list[Arrangement],
    money: list[dict[str, float]],
    probed: Probe | None,
) -> None:
    print_json({
        "model": shape.name,
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "context_length": tokens,
        "gpu": gpu.name,
        "num_gpus": num_gpus,
        "arrangements": [each.to_dict(gpu, num_gpus) | costs for each, costs in zip(found, money)],
        **({} if probed is None else {"probe": [row._asdict() for row in probed.rows], "scaled": probed.lines}),
    })  # fmt: skip


def _refuse(why: str, **options: object) -> None:
    """Refuse options that would have no effect."""
    from longspan.core.errors import ArgumentError

    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise ArgumentError(f"{', '.join(given)} has no effect here: {why}", fix="leave it out")


def _check(*, lora: int | None, qlora: int | None, price: float | None, budget: float | None) -> None:
    """Refuse options that exclude each other, or lack another."""
    from longspan.core.errors import ArgumentError

    if lora is not None and qlora is not None:
        raise ArgumentError("--lora and --qlora exclude each other")
    if budget is not None and not price:
        raise ArgumentError("--budget needs --price, the money for one GPU and hour")


def _tokens(context: str | None, of_recipe: int | None, *, max_context: bool) -> int | None:
    """Return the tokens of a sequence, None if they are to be found."""
    from longspan.core.errors import ArgumentError
    from longspan.core.units import parse_length

    if max_context:
        if context is not None:
            raise ArgumentError("--context and --max-context exclude each other")
        return None
    tokens = of_recipe if context is None else parse_length(context)
    if tokens is None:
        raise ArgumentError("give --context or --max-context, one of them")
    if tokens < 1:
        raise ArgumentError("a sequence needs at least one token", found=context)
    return tokens


def _machines(gpus: str | None, shape: ModelShape, adapters: Adapters | None) -> GpuCount:
    """Return what --gpus names; the figures of this machine's CPU are measured."""
    from longspan.core.errors import ArgumentError
    from longspan.plan.hardware import CPU, GpuCount, parse_gpus

    if gpus is None:
        raise ArgumentError("--gpus is missing: how many of which GPU", allowed="such as 8xh100, or cpu")
    named = parse_gpus(gpus)
    if named.gpu.name != CPU:
        return named
    from longspan.train.machine import measured_cpu

    gpu = measured_cpu(shape, adapters)
    typer.echo(
        f"this machine, measured: {gpu.flops / 1e9:,.0f} GFLOP/s, {gpu.bandwidth / 1e9:,.1f} GB/s of memory",
        err=True,
    )
    return GpuCount(1, gpu)


def _probed(model: str, gpus: str | None, rank: int | None) -> tuple[GpuCount, Probe]:
    """Run a few steps of a recipe here; return what is planned with the rates that were measured."""
    from longspan.cli.plan_model import is_recipe
    from longspan.core.errors import ArgumentError
    from longspan.plan.hardware import GpuCount, parse_gpus

    if rank is not None:
        raise ArgumentError("--probe takes a recipe as it is: no --lora, --qlora")
    if not is_recipe(model):
        raise ArgumentError("--probe runs steps of a recipe", found=model, allowed="a YAML file")
    wanted = None if gpus is None else parse_gpus(gpus)
    from longspan.train.probe import machine_name, probe
    from longspan.train.recipes import load_recipe

    if wanted is not None and wanted.gpu.name != (here := machine_name()):
        raise ArgumentError(
            "a probe measures this machine: what it finds does not hold for others",
            found=f"--gpus {gpus}",
            allowed=here,
        )
    loaded = load_recipe(model)
    probed = probe(loaded.config, loaded.folder / loaded.config.data_root)
    return GpuCount(1 if wanted is None else wanted.num, probed.gpu), probed


def _print_probe(probed: Probe) -> None:
    from longspan.core.units import format_bytes

    rows = [
        (
            f"{row.tokens:,}",
            f"{row.matrices + row.attention:.3g} s",
            f"{row.seconds:.3g} s",
            format_bytes(row.kept + row.grown),
            format_bytes(row.bytes),
        )
        for row in probed.rows
    ]
    heads = ("tokens", "step, estimated", "measured", "tensors, estimated", "memory, measured")
    print_table("steps on this machine", heads, rows)
    typer.echo("\n".join(probed.lines))


def _money(found: Arrangement, num_gpus: int, price: float | None, budget: float | None) -> dict[str, float]:
    if price is None:
        return {}
    of_token = found.seconds / found.tokens * num_gpus / 3600 * price
    costs = {"cost_of_a_billion_tokens": of_token * 1e9}
    return costs if budget is None else costs | {"tokens_for_the_budget": budget / of_token}


def _infer(
    shape: ModelShape,
    gpu: Gpu,
    num_gpus: int,
    tokens: int | None,
    kernel: str | None,
    kv: KvType | None,
    *,
    as_json: bool,
    explain: bool,
) -> None:
    from longspan.core.units import format_bytes, format_seconds
    from longspan.plan.inference import KvName, answering, explain_answering, longest_answer

    stored: KvName = "bfloat16" if kv is None else kv.value
    if tokens is None:
        tokens = longest_answer(shape, gpu, num_gpus=num_gpus, kernel=kernel, kv=stored)
    found = answering(shape, gpu, context=tokens, num_gpus=num_gpus, kernel=kernel, kv=stored)
    if as_json:
        print_json({
            "model": shape.name, "parameters": shape.parameters, "active_parameters": shape.active_parameters,
            "context_length": tokens, "gpu": gpu.name, "num_gpus": num_gpus, "kv_dtype": stored,
            **found._asdict(), "device": found.device,
        })  # fmt: skip
        return
    rows = [(name, format_bytes(size)) for name, size in found.parts.items()]
    rows.append(("together", f"{format_bytes(found.device)} of {format_bytes(gpu.memory)}"))
    print_table(f"{shape.name} answers at {tokens:,} tokens on {num_gpus} x {gpu.name}: bytes of a GPU; an estimate",
                ("what", "bytes"), rows)  # fmt: skip
    if found.fits:
        typer.echo(
            f"fits; the prompt is read in {format_seconds(found.prefill_seconds)}, "
            f"then {found.tokens_per_second:,.1f} tokens/s of one sequence"
        )
    else:
        typer.echo("does not fit: take more GPUs, GPUs with more memory, a shorter context, or --kv-dtype")
    if explain:
        lines = explain_answering(shape, gpu, context=tokens, num_gpus=num_gpus, kernel=kernel, kv=stored)
        typer.echo("\n".join(lines))


def _write(
    path: Path, subject: Subject, found: list[Arrangement], tokens: int, adapters: Adapters | None
) -> None:
    """Write the fastest arrangement as a recipe whose data are still to be named."""
    import yaml

    from longspan.core.errors import ArgumentError
    from longspan.core.files import atomic_write

    best = found[0]
    if best.limit is not None:
        raise ArgumentError("no recipe was written: nothing fits", found=f"lacks {best.limit}")
    compute = best.candidate.step.memory.compute_dtype
    memory = {**best.candidate.used, **({"compute_dtype": compute} if compute else {})}
    recipe: dict[str, Any] = {
        "model": {**subject.model, "dtype": best.candidate.step.dtype},
        "parallel": {name: value for name, value in best.parallel().items() if name != "schedule" and value != 1},
        "memory": memory,
        "stages": [{
            "name": "long", "context_length": tokens, "batch_tokens": best.tokens, "tokens": 100 * best.tokens,
            "micro_batch_tokens": tokens, "lr": 1e-5, "streams": {"text": {"rows": "ROWS"}},
        }],
    }  # fmt: skip
    if best.candidate.step.parallel.cp > 1:
        recipe["parallel"]["schedule"] = best.candidate.step.parallel.schedule_name
    if adapters is not None and adapters is subject.adapters:
        recipe["lora"] = subject.lora
    elif adapters is not None:
        recipe["lora"] = {"rank": adapters.rank, **({"quantize": "nf4"} if adapters.quantized else {})}
    head = "# From `longspan plan`: name your rows (`longspan data pack`), tokens and learning rate.\n"
    origin = subject.model.get("path")
    if origin is not None and "/" not in origin and not Path(origin).exists():
        head += f"# {origin} is a name of `longspan plan`: give the model's folder or its name on the hub.\n"
    with atomic_write(path, "w") as file:
        file.write(head + yaml.safe_dump(recipe, sort_keys=False))
    typer.echo(f"wrote {path}", err=True)


def _print(title: str, gpu: Gpu, found: list[Arrangement]) -> None:
    from longspan.core.units import format_bytes, format_count, format_seconds
    from longspan.plan.hardware import CPU
    from longspan.plan.longest import MISSING

    rows = []
    for each in found:
        memory = each.candidate.memory
        rate = each.tokens / each.seconds
        rows.append([
            each.name,
            each.candidate.step.parallel.dp_shard,
            each.candidate.describe(),
            format_seconds(each.seconds),
            format_count(rate),
            f"{100 * each.mfu:.1f}%",
            format_bytes(memory.device + gpu.workspace),
            format_bytes(memory.host_bytes),
            format_bytes(each.sent),
            "fits" if each.limit is None else f"lacks {each.limit}",
        ])  # fmt: skip
    columns = (
        "schedule", "dp", "memory settings", "step", "tokens/s", "MFU", "device", "host", "sent a GPU", "",
    )  # fmt: skip
    if found:
        title += f", {found[0].tokens:,} a step"
    print_table(f"{title}: the best of each schedule, fastest first; an estimate", columns, rows)
    if not found:
        return
    best = found[0]
    memory = best.candidate.memory
    verb = "fastest" if best.limit is None else "least is lacking with"
    parts = [("device", name, format_bytes(size)) for name, size in memory.parts.items() if size]
    beside = (
        "interpreter and libraries" if gpu.family == CPU else "context, buffers, fragmentation (allowance)"
    )
    parts.append(("device", beside, format_bytes(gpu.workspace)))
    parts += [("host", name, format_bytes(size)) for name, size in memory.host.items()]
    print_table(
        f"{verb}: {best.name}, a GPU's memory at its peak ({memory.moment})",
        ("where", "what", "bytes"),
        parts,
    )
    if memory.host and gpu.measured is None:
        typer.echo(
            f"with {format_bytes(gpu.host_memory)} of host memory a node; of another: "
            f"--gpus '{best.candidate.step.parallel.world}x{{like: {gpu.name}, host_memory: 64e9}}'"
        )
    if gpu.measured is not None and gpu.family == CPU:
        typer.echo(
            f"what grows with a row is counted {gpu.measured.activations:.2f} times: the C library's heap holds more "
            "than the tensors that are alive"
        )
    if best.limit is not None:
        typer.echo(MISSING)
