"""`longspan eval`: what a model finds and predicts at each context length, as records in a run folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli.output import Json, Seed, example, percent, print_json, print_table, quiet_transformers

if TYPE_CHECKING:
    from longspan.eval.documents import HeldOutDocument

app = typer.Typer(help="Measure a model at each context length.", no_args_is_help=True, rich_markup_mode=None)

Model = Annotated[str, typer.Option(help="Hugging Face folder, or hub name, of a causal language model.")]
Data = Annotated[
    list[str], typer.Option(help="Texts that training did not see: files, folders, patterns; many times.")
]
Lengths = Annotated[str, typer.Option(help="Context lengths in tokens, such as 1k,4k,32k.")]
Out = Annotated[Path, typer.Option(help="Run folder; records go to its records/.")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Tokenizer. Default: the one in the model's folder.")
]
Label = Annotated[str | None, typer.Option(help="Name of the model in reports. Default: that of its folder.")]
Rope = Annotated[
    str | None,
    typer.Option(help="RoPE to use instead of the model's own, such as '{rope_type: linear, factor: 8}'."),
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens in one forward pass, at least one sample.")]
TextField = Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")]
SourceField = Annotated[
    str | None, typer.Option(help="Field that names the source. Default: the place of the file does.")
]


@app.command(
    epilog=example("longspan eval needle --model model --data texts --lengths 128,256 --samples 2 --out run")
)
def needle(
    model: Model,
    data: Data,
    lengths: Lengths,
    out: Out,
    depths: Annotated[str, typer.Option(help="0: start of the text, 1: its end.")] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(min=1, help="Samples for each length and depth.")] = 10,
    distractors: Annotated[int, typer.Option(min=0, help="Other planted facts in the same text.")] = 0,
    tokenizer: TokenizerOption = None,
    label: Label = None,
    rope: Rope = None,
    text_field: TextField = "text",
    source_field: SourceField = None,
    batch_tokens: BatchTokens = 16384,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Ask for a fact planted in unseen text, at each length and depth.

    A sample is right when the model's first choices, token by token, spell the answer.
    """
    from longspan.eval.needle import NeedleTask

    settings = {
        "lengths": lengths.split(","),
        "depths": depths.split(","),
        "samples": samples,
        "num_distractors": distractors,
        "seed": seed,
    }
    task = NeedleTask.from_dict(settings, where="the command line")
    name = "needle_distractors" if distractors else "needle"
    prepared = _prepare(name, model, tokenizer, label, rope, out)
    documents = _read(data, text_field, source_field)
    from longspan.eval.needle_run import run_needle

    summary = run_needle(**prepared, task=task, documents=documents, batch_tokens=batch_tokens)
    if as_json:
        print_json(summary)
        return
    cells = {(cell["length"], cell["depth"]): percent(cell["mean"]) for cell in summary["cells"]}
    rows = [[f"{depth:g}", *(cells[length, depth] for length in task.lengths)] for depth in task.depths]
    title = f"needle, {summary['label']}: {summary['scored']} of {summary['samples']} samples scored"
    print_table(title, ("depth", *(f"{length:,}" for length in task.lengths)), rows)


@app.command(epilog=example("longspan eval ppl --model model --data texts --lengths 64,256 --out run"))
def ppl(
    model: Model,
    data: Data,
    lengths: Lengths,
    out: Out,
    spans: Annotated[int, typer.Option(min=1, help="Spans of the longest length for each source.")] = 16,
    buckets: Annotated[int, typer.Option(min=1, help="Points of the curve over positions.")] = 16,
    tokenizer: TokenizerOption = None,
    label: Label = None,
    rope: Rope = None,
    text_field: TextField = "text",
    source_field: SourceField = None,
    batch_tokens: BatchTokens = 16384,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure perplexity of unseen text by context length and by position."""
    from longspan.eval.ppl import PplTask

    settings = {"lengths": lengths.split(","), "num_spans": spans, "num_buckets": buckets, "seed": seed}
    task = PplTask.from_dict(settings, where="the command line")
    prepared = _prepare("ppl", model, tokenizer, label, rope, out)
    documents = _read(data, text_field, source_field)
    from longspan.eval.ppl_run import run_ppl

    summary = run_ppl(**prepared, task=task, documents=documents, batch_tokens=batch_tokens)
    if as_json:
        print_json(summary)
        return
    rows = [
        [row["source"], f"{row['length']:,}", f"{row['tokens']:,}", _decimal(row["perplexity"])]
        for row in summary["by_length"]
    ]
    title = f"perplexity, {summary['label']}: {summary['scored']} of {summary['samples']} windows scored"
    print_table(title, ("source", "length", "tokens", "perplexity"), rows)


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _read(data: Sequence[str], text_field: str, source_field: str | None) -> list[HeldOutDocument]:
    """Return the documents, named by their content so that records do not depend on where the files stand."""
    from longspan.core.files import sha256_bytes
    from longspan.data.readers import read_documents
    from longspan.eval.documents import HeldOutDocument

    documents: dict[str, HeldOutDocument] = {}
    for document in read_documents(data, text_field=text_field, source_field=source_field):
        name = sha256_bytes(f"{document.source}\0{document.text}".encode())[:16]
        documents.setdefault(name, HeldOutDocument(name, document.text, document.source))
    return list(documents.values())


def _prepare(
    task: str, name: str, tokenizer: str | None, label: str | None, rope: str | None, out: Path
) -> dict[str, Any]:
    """Load model and tokenizer; return the arguments that every runner takes."""
    from longspan.core.config import parse_yaml
    from longspan.core.errors import ArgumentError, DataError
    from longspan.data.tokenizer import load_tokenizer

    path = Path(name)
    label = label or path.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
        raise ArgumentError(
            "a label is part of a file name", found=repr(label), allowed="letters, digits and ._-"
        )
    if tokenizer is None and path.is_dir() and not (path / "tokenizer.json").is_file():
        raise DataError(f"{path} has no tokenizer.json", fix="name the tokenizer with --tokenizer")
    loaded = load_tokenizer(tokenizer or name)
    parameters = parse_yaml(rope, where="--rope") if rope else None
    from longspan.models.hf import load_model, usable_device
    from longspan.models.identity import model_identity

    quiet_transformers()
    model = load_model(name, rope=parameters).to(usable_device()).eval()
    trained_length = model.config.get_text_config(decoder=True).max_position_embeddings
    return {
        "model": model,
        "tokenizer": loaded,
        "label": label,
        "model_info": {**model_identity(model, name), "trained_length": trained_length},
        "out": out / "records" / f"{task}-{label}.jsonl",
    }
