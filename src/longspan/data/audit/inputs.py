"""What an audit looks at: token stores that are named, or one that is made of raw input for as long as it takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import behind_link
from longspan.data.jobs import Executor
from longspan.data.store.token_store import MANIFEST, TokenStore
from longspan.data.tokenize import TokenizeConfig, tokenize_corpus
from longspan.data.tokenizer import Tokenizer

__all__ = ["are_stores", "store_of_input"]


def are_stores(places: Sequence[str | os.PathLike[str]]) -> bool:
    """Return whether all places are token stores, not raw input. Raises DataError where only some are or nothing is."""
    for place in map(str, places):
        if not (Path(place).exists() or "://" in place or place.startswith("@") or set(place) & set("*?[")):
            raise DataError(f"there is neither a token store nor text at {place}")
    stores = [place for place in places if (Path(place) / MANIFEST).is_file()]
    if stores and len(stores) < len(places):
        raise DataError(
            "token stores and raw input are audited apart",
            found=f"stores: {', '.join(map(str, stores))}; {len(places) - len(stores)} other inputs",
            fix="tokenize the input, and name its store beside the others",
        )
    return bool(stores)


@contextmanager
def store_of_input(
    inputs: Sequence[str],
    tokenizer: Tokenizer | None,
    out: str | Path,
    reading: TokenizeConfig,
    executor: Executor,
) -> Iterator[TokenStore]:
    """Yield a store of raw input, made beside `out` and removed in the end: it takes 2 or 4 bytes a token.

    Its documents have the keys that `tokenize_corpus` gives them with the same `reading`.

    Raises:
        ArgumentError: no tokenizer is given.
        DataError, RunError: as `tokenize_corpus`.
    """
    if tokenizer is None:
        raise ArgumentError(
            "raw input is audited by the tokens that it will be",
            found=", ".join(inputs),
            fix="name a tokenizer (--tokenizer), that of the model to train; or a token store",
        )
    out = behind_link(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        yield tokenize_corpus(inputs, tokenizer, Path(aside) / "store", reading, executor=executor)
