"""Options that several evaluations share, and the documents that they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from longspan.eval.documents import HeldOutDocument

Bos = Literal["auto", "always", "never"]
TooLong = Literal["refuse", "skip"]

Lengths = Annotated[str, typer.Option(help="Context lengths in tokens, such as 1k,4k,32k or 1k:8k:8.")]
Out = Annotated[Path, typer.Option(file_okay=False, help="Run folder; records go to its records/.")]
TextField = Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")]
SourceField = Annotated[
    str | None, typer.Option(help="Field that names the source. Default: the place of the file does.")
]
BosOption = Annotated[
    Bos, typer.Option(help="Whether prompts begin with BOS. auto: as the tokenizer itself would have it.")
]
TooLongOption = Annotated[
    TooLong, typer.Option(help="Contexts over --max-length: an error, or samples recorded as unscored.")
]
RetryUnscored = Annotated[
    bool, typer.Option("--retry-unscored", help="Ask again for recorded samples that have no score.")
]
Note = Annotated[str | None, typer.Option(help="A remark for readers of the records.")]


def read_held_out(
    data: Sequence[str], *, text_field: str = "text", source_field: str | None = None
) -> list[HeldOutDocument]:
    """Return the documents, named by their content so that records do not depend on where the files stand.

    They come in the order of their paths, and of their places in a file.
    """
    from longspan.core.files import sha256_bytes
    from longspan.data.readers import read_documents
    from longspan.eval.documents import HeldOutDocument

    documents: dict[str, HeldOutDocument] = {}
    for document in read_documents(data, text_field=text_field, source_field=source_field):
        name = sha256_bytes(f"{document.source}\0{document.text}".encode())[:16]
        documents.setdefault(name, HeldOutDocument(name, document.text, document.source))
    return list(documents.values())
