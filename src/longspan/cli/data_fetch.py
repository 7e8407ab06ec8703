"""`longspan data fetch`: bring a data set or a model to this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from longspan.cli.from_settings import from_settings
from longspan.cli.output import Json, example, print_json, print_table

EXAMPLE = example("longspan data fetch texts --include '*.txt' --out fetched")


@from_settings()
def fetch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="hf://org/name[@revision][/path-or-split], an address such as s3://bucket/prefix, gs:// or "
            "https://, or a folder.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to fill; a download that was stopped goes on there.")],
    kind: Annotated[
        Literal["dataset", "model"],
        typer.Option(
            "--type", help="What SOURCE is on the hub; a model or an adapter may be named org/name too."
        ),
    ] = "dataset",
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Only files that match, such as '*.parquet'; may be given many times."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="No files that match, such as '*.bin'; may be given many times."),
    ] = None,
    storage_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Setting of the file system, such as requester_pays=true or anon=true for S3; may be given "
            "many times.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Files downloaded at once.")] = 4,
    as_json: Json = False,
) -> None:
    """Download a data set, a model or an adapter, skipping what is already here; stopped, the same command goes on."""
    from longspan.core.units import format_bytes
    from longspan.data.readers.fetch import fetch as fetch_files

    report = fetch_files(
        source,
        out,
        kind=kind,
        include=include or (),
        exclude=exclude or (),
        storage_options=_storage_options(storage_option or []),
        num_workers=workers,
    )
    if as_json:
        print_json({"source": source, "out": str(out), **report._asdict()})
        return
    rows = [
        ("files", report.files),
        ("bytes", format_bytes(report.bytes)),
        ("files fetched now", report.fetched_files),
        ("bytes fetched now", format_bytes(report.fetched_bytes)),
    ]
    print_table(f"{source} is in {out}", ("what", "count"), rows)


def _storage_options(given: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE; true, false, numbers and JSON objects are taken as such, everything else as text."""
    from longspan.core.errors import ArgumentError

    options: dict[str, Any] = {}
    for item in given:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ArgumentError(
                "--storage-option is written KEY=VALUE",
                found=repr(item),
                allowed="such as requester_pays=true",
            )
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
