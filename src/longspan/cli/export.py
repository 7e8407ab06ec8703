"""`longspan export`: what training left, as a Hugging Face folder for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

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


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A stage's folder, a checkpoint, an adapter folder, a model folder, or a run folder (its last stage).",
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
    as_json: Json = False,
) -> None:
    """Write a folder that transformers and vLLM load without longspan, with its RoPE and context length.

    An adapter is merged in float32 with its base, taken back from 4 bits first if it was quantised.
    """
    from longspan.core.errors import ArgumentError
    from longspan.models.export import export_adapter, export_model

    if out.exists():
        raise ArgumentError(f"{out} already exists", fix="choose another place with --out")
    if adapter and dtype is not None:
        raise ArgumentError("--dtype has no effect on an adapter, which stays as it was trained: in float32")
    quiet_transformers()
    source = _find(checkpoint, base)
    words = tokenizer or source.tokenizer
    if adapter:
        if source.base is None:
            raise ArgumentError(f"{checkpoint} has no adapter", fix="export it without --adapter")
        report = export_adapter(source.model, out, base=source.base, tokenizer=words)
    else:
        generation = source.base or checkpoint
        report = export_model(source.model, out, dtype=dtype, tokenizer=words, generation=generation)
    if as_json:
        print_json({**report._asdict(), "path": str(report.path)})
    else:
        _print(report)


def _find(checkpoint: Path, base: str | None) -> _Source:
    from longspan.core.errors import ArgumentError, DataError
    from longspan.core.files import read_json
    from longspan.models.hf import load_model

    if (checkpoint / "adapter_config.json").is_file():
        from longspan.models.lora import load_adapter

        model = load_adapter(checkpoint, base=base)
        origin = base or str(read_json(checkpoint / "adapter_config.json")["base_model_name_or_path"])
        return _Source(model, _words(checkpoint) or _words(origin), origin)
    if (checkpoint / "state.json").is_file():
        from longspan.train.trained import load_trained

        trained = load_trained(checkpoint, base=base)
        return _Source(trained.model, trained.tokenizer, trained.base)
    if (checkpoint / "stages").is_dir():
        from longspan.train.config import TrainConfig

        last = TrainConfig.from_yaml(checkpoint / "config.yaml").stages[-1].name
        if not (checkpoint / "stages" / last).is_dir():
            raise DataError(
                f"the last stage of {checkpoint}, {last}, is not done",
                fix="finish the run, or name one of its stages/ or checkpoints/",
            )
        return _find(checkpoint / "stages" / last, base)
    if not (checkpoint / "config.json").is_file():
        raise DataError(
            f"{checkpoint} is nothing to export",
            found="no config.json, adapter_config.json, state.json or stages/"
            if checkpoint.is_dir()
            else "no such folder",
            allowed="a stage's folder, a checkpoint, an adapter or model folder, a run folder",
        )
    if base is not None:
        raise ArgumentError(f"{checkpoint} is a whole model; --base is for adapters")
    return _Source(load_model(checkpoint), _words(checkpoint), None)


def _words(origin: str | Path) -> Path | None:
    """Return the local folder of a model if it has a tokenizer, fetched from the hub where it is a name."""
    from longspan.models.hf import tokenizer_folder

    folder = tokenizer_folder(origin)
    found = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return folder if found else None


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
