"""`longspan export`: what training left, as a Hugging Face folder for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from longspan.cli.output import Json, example, print_json, print_table, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from longspan.models.export import ExportReport

EXAMPLE = example(
    "longspan export run/stages/short --out exported",
    "longspan export run/checkpoints/step-00000004 --out exported-bfloat16 --dtype bfloat16",
)


class _Source(NamedTuple):
    """A model that was found, and the folders its tokenizer, generation settings and base come from."""

    model: PreTrainedModel
    tokenizer: Path | None
    base: str | None
    generation: str
    notes: list[str]


class _Changes(NamedTuple):
    """What is written in place of what the model's config says; None: that."""

    rope: Mapping[str, Any] | None
    rope_theta: float | None
    max_length: int | None

    @property
    def options(self) -> list[str]:
        """The options that were given."""
        names = ("--rope", "--rope-theta", "--max-length")
        return [name for name, value in zip(names, self) if value is not None]


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A stage's folder, a checkpoint, an adapter folder, a model folder, a run folder (its last stage), or "
            "the hub name of a model or an adapter.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the adapter alone instead of merging it into its base.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model of an adapter, or the model that a checkpoint's run began with. Default: as in training."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of the written weights. Default: that of the trained model, or of the base."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder with tokenizer files. Default: those of the checkpoint or its base."),
    ] = None,
    rope: Annotated[
        str | None,
        typer.Option(
            help="RoPE to write instead of the model's own, such as '{rope_type: linear, factor: 8}': that of its "
            "evaluation, where config.json says another."
        ),
    ] = None,
    rope_theta: Annotated[
        float | None, typer.Option(help="Base of the RoPE instead of the model's own, such as 200e6.")
    ] = None,
    max_length: Annotated[
        str | None,
        typer.Option(help="Positions to write where the model's config says fewer, such as 80k."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a folder that transformers and vLLM load without longspan, with its RoPE and context length.

    An adapter is merged in float32 with its base, taken back from 4 bits first if it was quantised.
    """
    from longspan.core.errors import ArgumentError
    from longspan.models.export import export_adapter, export_model
    from longspan.models.places import has_tokenizer

    if out.exists():
        raise ArgumentError(f"{out} already exists", fix="choose another place with --out")
    if adapter and dtype is not None:
        raise ArgumentError("--dtype has no effect on an adapter, which stays as it was trained: in float32")
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise ArgumentError(
            f"{tokenizer} has no tokenizer", allowed="a folder with tokenizer.json or tokenizer.model"
        )
    quiet_transformers()
    changes = _changes(rope, rope_theta, max_length)
    source = _find(checkpoint, base, changes)
    words = tokenizer or source.tokenizer
    if adapter:
        if source.base is None:
            raise ArgumentError(f"{checkpoint} has no adapter", fix="export it without --adapter")
        report = export_adapter(source.model, out, base=source.base, tokenizer=words)
    else:
        generation = source.generation
        report = export_model(source.model, out, dtype=dtype, tokenizer=words, generation=generation)
    report.notes[:0] = source.notes
    if as_json:
        print_json({**report._asdict(), "path": str(report.path)})
    else:
        _print(report)


def _changes(rope: str | None, rope_theta: float | None, max_length: str | None) -> _Changes:
    from longspan.core.config import parse_yaml
    from longspan.core.units import parse_length

    return _Changes(
        parse_yaml(rope, where="--rope") if rope else None,
        rope_theta,
        None if max_length is None else parse_length(max_length),
    )


def _find(checkpoint: str, base: str | None, changes: _Changes) -> _Source:
    from longspan.core.errors import ArgumentError, DataError
    from longspan.models.places import adapter_folder, is_hub_name

    folder = Path(checkpoint)
    adapter = adapter_folder(checkpoint)
    if adapter is not None:
        return _adapter(checkpoint, adapter, base, changes)
    if (folder / "state.json").is_file():
        from longspan.train.trained import load_trained

        if any(change is not None for change in changes):
            raise ArgumentError(
                f"{checkpoint} is a checkpoint, which is written as it was trained",
                found=", ".join(changes.options),
                fix="export it first, and then what was written with these options",
            )
        trained = load_trained(folder, base=base)
        return _Source(trained.model, trained.tokenizer, trained.base, trained.base or checkpoint, [])
    if (folder / "stages").is_dir():
        from longspan.train.config import TrainConfig

        last = TrainConfig.from_yaml(folder / "config.yaml").stages[-1].name
        if not (folder / "stages" / last).is_dir():
            raise DataError(
                f"the last stage of {checkpoint}, {last}, is not done",
                fix="finish the run, or name one of its stages/ or checkpoints/",
            )
        return _find(str(folder / "stages" / last), base, changes)
    if not (folder / "config.json").is_file() and not is_hub_name(checkpoint):
        raise DataError(
            f"{checkpoint} is nothing to export",
            found="no config.json, adapter_config.json, state.json or stages/"
            if folder.is_dir()
            else "no such folder",
            allowed="a stage's folder, a checkpoint, an adapter or model folder, a run folder, a hub name",
        )
    if base is not None:
        raise ArgumentError(f"{checkpoint} is a whole model; --base is for adapters")
    model = _load(checkpoint, None, changes)
    return _Source(model, _words(checkpoint), None, checkpoint, [])


def _adapter(checkpoint: str, folder: Path, base: str | None, changes: _Changes) -> _Source:
    """Load an adapter with its base; what only the base says of it is noted."""
    from longspan.core.log import log_once
    from longspan.models.hf import own_config, rope_of
    from longspan.models.places import adapter_base, tokenizer_home

    origin = base or adapter_base(folder)
    words = tokenizer_home(checkpoint, base=origin)
    if words == origin:
        log_once("models", f"{checkpoint} has no tokenizer: that of its base {origin} is used")
    model = _load(checkpoint, origin, changes)
    notes = []
    if not (folder / "config.json").is_file() and changes.rope is None and changes.rope_theta is None:
        saved = own_config(origin, as_saved=True)
        if rope_of(model.config) == rope_of(saved):
            notes.append(
                f"the adapter does not say which RoPE it was trained with, so that of its base is written: "
                f"{json.dumps(rope_of(saved))}; name another with --rope or --rope-theta, and --max-length"
            )
    return _Source(model, _words(words), origin, origin, notes)


def _load(checkpoint: str, base: str | None, changes: _Changes) -> PreTrainedModel:
    """Load a model or, with `base`, an adapter, with what is changed about it."""
    from longspan.core.errors import ArgumentError
    from longspan.models.hf import load_model, own_config, rope_settings
    from longspan.models.hf_config import changed_config, text_config

    length = changes.max_length
    rope = rope_settings(checkpoint, changes.rope, changes.rope_theta, base=base)
    if length is not None:
        config = own_config(checkpoint, base=base, as_saved=rope is not None)
        written = text_config(changed_config(config, rope=rope, context=length)).max_position_embeddings
        if written != length:
            raise ArgumentError(
                "--max-length only raises the positions of a model, and not where its RoPE works by them",
                found=f"{length}; the model has {written}",
                fix="leave it out",
            )
    if base is None:
        return load_model(checkpoint, rope=rope, max_position_embeddings=length)
    from longspan.models.lora import load_adapter

    return load_adapter(checkpoint, base=base, rope=rope, max_position_embeddings=length)


def _words(origin: str) -> Path | None:
    """Return the local folder of a model if it has a tokenizer, fetched from the hub where it is a name."""
    from longspan.models.places import has_tokenizer, tokenizer_folder

    folder = tokenizer_folder(origin)
    return folder if has_tokenizer(folder) else None


def _print(report: ExportReport) -> None:
    from longspan.core.units import format_count

    def error(value: float | None) -> str | None:
        return None if value is None else f"{value:.1e}"

    rows = [
        ("written", report.kind),
        ("parameters", format_count(report.parameters)),
        ("type", report.dtype),
        ("logits changed by merging, at most", error(report.merge_error)),
        (f"logits changed by rounding to {report.dtype}, at most", error(report.rounding_error)),
    ]
    print_table(str(report.path), ("", ""), [row for row in rows if row[1] is not None])
    for note in report.notes:
        typer.echo(f"note: {note}")
