"""`longspan export`: a trained model as a Hugging Face folder for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from longspan.cli.from_settings import Part, Used, from_settings, write_used
from longspan.cli.output import Json, example, print_json, print_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from longspan.models.export import ExportReport
    from longspan.models.export_config import ExportConfig

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


@from_settings(settings=Part("longspan.models.export_config:ExportConfig", argument="checkpoint"))
def export(
    settings: ExportConfig,
    used: Used,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    card: Annotated[
        list[Path] | None,
        typer.Option(
            help="Run folder with records of this model: README.md says what they show. Many times."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a folder that transformers and vLLM load without longspan, with its RoPE and context length.

    An adapter is merged in float32 with its base, taken back from 4 bits first if it was quantised. With --gguf there
    is a file for llama.cpp too, with --push the folder is on the Hugging Face hub.
    """
    from longspan.core.errors import ArgumentError
    from longspan.models.export import export_adapter, export_model
    from longspan.models.places import has_tokenizer
    from longspan.steps.opening import quiet_transformers

    words = None if settings.tokenizer is None else Path(settings.tokenizer)
    if out.exists():
        raise ArgumentError(f"{out} already exists", fix="choose another place with --out")
    if settings.adapter and settings.dtype is not None:
        raise ArgumentError("--dtype has no effect on an adapter, which stays as it was trained: in float32")
    if words is not None and not has_tokenizer(words):
        raise ArgumentError(
            f"{words} has no tokenizer", allowed="a folder with tokenizer.json or tokenizer.model"
        )
    converter = _before_work(settings)
    quiet_transformers()
    source = _find(settings.checkpoint, settings)
    words = words or source.tokenizer
    if settings.gguf is not None:
        _check_gguf(source, words)
    # Before the model is used up, and before anything is written: records of another model are refused.
    text = _card(card, source, settings, out.name) if card else None
    if settings.adapter:
        if source.base is None:
            raise ArgumentError(f"{settings.checkpoint} has no adapter", fix="export it without --adapter")
        report = export_adapter(source.model, out, base=source.base, tokenizer=words)
    else:
        report = export_model(
            source.model, out, dtype=settings.dtype, tokenizer=words, generation=source.generation
        )
    if text is not None:
        from longspan.core.files import atomic_write

        with atomic_write(out / "README.md", "w") as file:
            file.write(text)
    write_used(used, out)
    report.notes[:0] = source.notes
    made = {"gguf": None if converter is None else _write_gguf(settings, out, converter), "pushed": None}
    if settings.push is not None:
        from longspan.models.hub_upload import push_folder

        made["pushed"] = push_folder(out, settings.push, public=settings.public, overwrite=settings.overwrite)
    if as_json:
        print_json({**report._asdict(), "path": str(report.path), **made})
    else:
        _print(report, made)


def _before_work(settings: ExportConfig) -> list[str] | None:
    """Refuse what the hub or a converter would refuse in the end; return the words that start the converter."""
    if settings.push is not None:
        from longspan.models.hub_upload import check_push

        check_push(settings.push, overwrite=settings.overwrite)
    if settings.gguf is None:
        return None
    from longspan.models.gguf_file import find_converter

    return find_converter(settings.converter)


def _check_gguf(source: _Source, tokenizer: Path | None) -> None:
    from longspan.core.errors import ArgumentError
    from longspan.models.gguf_file import refuse_config

    if tokenizer is None:
        raise ArgumentError(
            "a GGUF file holds a tokenizer, and none is found", fix="name it with --tokenizer"
        )
    refuse_config(source.model.config)


def _write_gguf(settings: ExportConfig, out: Path, converter: list[str]) -> str:
    from longspan.models.gguf_file import write_gguf

    assert settings.gguf is not None
    kind = "" if settings.gguf == "auto" else f"-{settings.gguf}"
    return str(write_gguf(out, out / f"{out.name}{kind}.gguf", settings.gguf, converter))


def _card(runs: list[Path], source: _Source, settings: ExportConfig, name: str) -> str:
    from longspan.core.errors import ArgumentError
    from longspan.models.identity import model_identity
    from longspan.report.card import model_card
    from longspan.report.load import load_runs
    from longspan.steps.opening import find_folder

    if settings.adapter:
        raise ArgumentError("--card is for whole models: an adapter has a README.md of its own")
    fingerprint = model_identity(source.model, find_folder(settings.checkpoint))["fingerprint"]
    config = source.model.config.to_dict()
    return model_card(load_runs(runs), fingerprint=fingerprint, name=name, config=config, base=source.base)


def _find(checkpoint: str, settings: ExportConfig) -> _Source:
    from longspan.core.errors import ArgumentError, DataError
    from longspan.models.places import adapter_folder, is_hub_name
    from longspan.steps.opening import find_folder

    folder, base = Path(checkpoint), settings.base
    adapter = adapter_folder(checkpoint)
    if adapter is not None:
        return _adapter(checkpoint, adapter, settings)
    if (folder / "state.json").is_file():
        from longspan.train.trained import load_trained

        if settings.changes:
            raise ArgumentError(
                f"{checkpoint} is a checkpoint, which is written as it was trained",
                found=", ".join(settings.changes),
                fix="export it first, and then what was written with these options",
            )
        trained = load_trained(folder, base=base)
        return _Source(trained.model, trained.tokenizer, trained.base, trained.base or checkpoint, [])
    if (last := find_folder(checkpoint)) != checkpoint:
        return _find(last, settings)
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
    model = _load(checkpoint, None, settings)
    return _Source(model, _words(checkpoint), None, checkpoint, [])


def _adapter(checkpoint: str, folder: Path, settings: ExportConfig) -> _Source:
    """Load an adapter with its base; what only the base says of it is noted."""
    from longspan.core.log import log_once
    from longspan.models.hf import own_config, rope_of
    from longspan.models.places import adapter_base, tokenizer_home

    origin = settings.base or adapter_base(folder)
    words = tokenizer_home(checkpoint, base=origin)
    if words == origin:
        log_once("models", f"{checkpoint} has no tokenizer: that of its base {origin} is used")
    model = _load(checkpoint, origin, settings)
    notes = []
    if not (folder / "config.json").is_file() and settings.rope is None and settings.rope_theta is None:
        saved = own_config(origin, as_saved=True)
        if rope_of(model.config) == rope_of(saved):
            notes.append(
                f"the adapter does not say which RoPE it was trained with, so that of its base is written: "
                f"{json.dumps(rope_of(saved))}; name another with --rope or --rope-theta, and --max-length"
            )
    return _Source(model, _words(words), origin, origin, notes)


def _load(checkpoint: str, base: str | None, settings: ExportConfig) -> PreTrainedModel:
    """Load a model or, with `base`, an adapter, with what is changed about it."""
    from longspan.core.errors import ArgumentError
    from longspan.models.hf import load_model, own_config, rope_settings
    from longspan.models.hf_config import changed_config, text_config

    length = settings.max_length
    rope = rope_settings(checkpoint, settings.rope, settings.rope_theta, base=base)
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


def _print(report: ExportReport, made: Mapping[str, str | None]) -> None:
    from longspan.core.units import format_count

    def error(value: float | None) -> str | None:
        return None if value is None else f"{value:.1e}"

    rows = [
        ("written", report.kind),
        ("parameters", format_count(report.parameters)),
        ("type", report.dtype),
        ("logits changed by merging, at most", error(report.merge_error)),
        (f"logits changed by rounding to {report.dtype}, at most", error(report.rounding_error)),
        ("for llama.cpp", made["gguf"]),
        ("on the hub", made["pushed"]),
    ]
    print_table(str(report.path), ("", ""), [row for row in rows if row[1] is not None])
    for note in report.notes:
        typer.echo(f"note: {note}")
