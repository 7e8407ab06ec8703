"""`longspan plan`: which arrangement of GPUs trains a model at a context length fastest, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.output import Json, example, print_json, print_table

if TYPE_CHECKING:
    from longspan.plan.models import ModelShape
    from longspan.plan.search import Arrangement

EXAMPLE = example(
    "longspan plan llama-3-8b --context 512k --gpus 8xh100",
    "longspan plan llama-3-8b --context 80k --gpus a800 --qlora 32 --json",
)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name such as llama-3-8b, a Hugging Face folder, a config.json, or a recipe.",
        ),
    ],
    context: Annotated[str, typer.Option(help="Tokens of a sequence, such as 512k.")],
    gpus: Annotated[str, typer.Option(help="How many of which GPU, such as 8xh100.")],
    batch_tokens: Annotated[
        str, typer.Option(help="Tokens of an optimizer step, one sequence at least.")
    ] = "4194304",
    lora: Annotated[
        int | None, typer.Option(min=1, help="Train adapters of this rank, not the weights.")
    ] = None,
    qlora: Annotated[
        int | None, typer.Option(min=1, help="Train adapters of this rank beside weights in 4 bits.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory and time of a training step and show the fastest arrangement that fits."""
    from longspan.core.errors import ArgumentError
    from longspan.core.units import parse_length, parse_tokens
    from longspan.plan.hardware import parse_gpus
    from longspan.plan.search import search
    from longspan.plan.training_step import Adapters

    num_gpus, gpu = parse_gpus(gpus)
    if lora is not None and qlora is not None:
        raise ArgumentError("--lora and --qlora exclude each other")
    rank = qlora or lora
    tokens = parse_length(context)
    if tokens < 1:
        raise ArgumentError("a sequence needs at least one token", found=context)
    shape = find_shape(model)
    found = search(
        shape,
        gpu,
        context=tokens,
        num_gpus=num_gpus,
        batch_tokens=parse_tokens(batch_tokens),
        lora=None if rank is None else Adapters(rank, quantized=qlora is not None),
    )
    if as_json:
        print_json({
            "model": shape.name,
            "parameters": shape.parameters,
            "context_length": tokens,
            "gpu": gpu.name,
            "num_gpus": num_gpus,
            "arrangements": [each.to_dict(num_gpus) for each in found],
        })  # fmt: skip
        return
    title = f"{shape.name} at {tokens:,} tokens on {num_gpus} x {gpu.name}"
    _print(title, found, num_gpus)


def find_shape(model: str) -> ModelShape:
    """Return the shape of what MODEL names; a recipe is read for its model.

    Raises:
        ArgumentError, ConfigError, DataError: nothing of that name, or a model without an estimate.
    """
    from longspan.core.config import read_yaml
    from longspan.core.errors import ArgumentError, ConfigError
    from longspan.plan.models import MODELS, known_shape, plain_name, published_configs

    path = Path(model)
    if path.suffix in (".yaml", ".yml") and model not in MODELS:
        recipe = read_yaml(path)
        of_model = recipe.get("model")
        if isinstance(of_model, dict) and isinstance(of_model.get("hf_config"), dict):
            return _shape_of_config(of_model["hf_config"], path.stem)
        origin = of_model.get("path") if isinstance(of_model, dict) else None
        if not isinstance(origin, str):
            raise ConfigError(f"the recipe {path} names no model", allowed="model.path or model.hf_config")
        folder = path.parent / str(recipe.get("data_root") or ".") / origin
        return find_shape(str(folder) if folder.is_dir() else origin)
    if not path.exists() and (shape := known_shape(model)) is not None:
        return shape
    published = published_configs()
    if not path.exists() and (name := plain_name(model)) in published:
        return _shape_of_config(published[name], name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ArgumentError(
            "unknown model",
            found=model,
            allowed=f"{', '.join([*MODELS, *published])}; a folder with config.json; a config.json; a recipe",
        )
    return _shape_of_config(file, path.name if path.is_dir() else path.parent.name or path.stem)


def _shape_of_config(config: Path | dict[str, Any], name: str) -> ModelShape:
    from longspan.core.errors import DataError
    from longspan.core.files import read_json
    from longspan.models.shape import shape_of_fields

    fields = read_json(config) if isinstance(config, Path) else config
    if not isinstance(fields, dict):
        raise DataError(
            f"{config} holds no configuration", found=type(fields).__name__, allowed="a JSON object"
        )
    return shape_of_fields(fields, name)


def _print(title: str, found: list[Arrangement], num_gpus: int) -> None:
    from longspan.core.units import format_bytes, format_count, format_seconds
    from longspan.plan.training import WORKSPACE

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
            format_bytes(memory.device + WORKSPACE),
            format_bytes(memory.host_bytes),
            format_bytes(each.sent),
            "fits" if each.limit is None else f"lacks {each.limit}",
        ])  # fmt: skip
    columns = (
        "schedule", "dp", "memory settings", "step", "tokens/s", "MFU", "device", "host", "sent a GPU", "",
    )  # fmt: skip
    print_table(f"{title}: the best of each schedule, fastest first; an estimate", columns, rows)
    if not found:
        return
    best = found[0]
    memory = best.candidate.memory
    verb = "fastest" if best.limit is None else "least is lacking with"
    parts = [("device", name, format_bytes(size)) for name, size in memory.parts.items() if size]
    parts.append(("device", "context, buffers, fragmentation (allowance)", format_bytes(WORKSPACE)))
    parts += [("host", name, format_bytes(size)) for name, size in memory.host.items()]
    print_table(
        f"{verb}: {best.name}, a GPU's memory at its peak ({memory.moment})",
        ("where", "what", "bytes"),
        parts,
    )
    if best.limit is not None:
        from longspan.plan.search import MISSING

        typer.echo(MISSING)
