"""One tokenizer, two engines behind it: the Hugging Face library, and gigatoken where it gives the same ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from longspan.core.files import read_json
from longspan.data.tokenizer.fast import FastEngine
from longspan.data.tokenizer.safe_cuts import CutRule

Backend = Literal["gigatoken", "hf"]
ROLES = ("bos", "eos", "pad")
# Longer texts are encoded in pieces: the Hugging Face library slows down with length, both need memory for it.
PIECE_CHARACTERS: dict[Backend, int] = {"gigatoken": 1 << 20, "hf": 1 << 14}


class Offsets(NamedTuple):
    """Ids of a text with the characters each stands for."""

    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    """One after the last character. A token that is part of a character covers the whole character."""


class FoundOut(NamedTuple):
    """What takes time to find out about a tokenizer."""

    fingerprint: str
    vocab_size: int
    special_ids: tuple[int | None, ...]
    """In the order of ROLES."""
    backend: Backend
    backend_reason: str
    cuts: bool
    """Whether the rule for cutting long texts was found to hold."""
    notes: tuple[str, ...]
    """What a user should know."""


class Findings(NamedTuple):
    """What loading a tokenizer found out; processes of the same machine need not find it out again."""

    name: str
    machine: str
    digest: str
    """SHA-256 of the file and the configs beside it."""
    known: FoundOut
    cuts: CutRule | None


class Tokenizer:
    """A tokenizer, ready to encode; made by `load_tokenizer`. Adds no special tokens on its own.

    A long text is encoded in pieces where that gives the same ids (see `safe_cuts`). Pickled, it is the name of
    its file and what was found out about it, loaded once in each process.
    """

    def __init__(
        self,
        path: Path,
        findings: Findings,
        *,
        reference: Callable[[], tokenizers.Tokenizer],
        fast: FastEngine | None,
        reload: Callable[[Findings], Tokenizer],
    ) -> None:
        self.path = path
        """The file: a tokenizer.json, a SentencePiece model, or ranks of tiktoken."""
        self.fingerprint = findings.known.fingerprint
        """SHA-256 of everything in the file that decides the ids of a text."""
        self.bos_id, self.eos_id, self.pad_id = findings.known.special_ids
        self.vocab_size = findings.known.vocab_size
        """One more than the largest id, special tokens included."""
        self.backend = findings.known.backend
        self.backend_reason = findings.known.backend_reason
        """Why this engine was taken."""
        self._findings, self._make_reference = findings, reference
        self._fast, self._cuts, self._reload = fast, findings.cuts, reload

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reload, (self._findings,)

    @cached_property
    def _reference(self) -> tokenizers.Tokenizer:
        return self._make_reference()

    @cached_property
    def adds_bos(self) -> bool:
        """Whether this tokenizer itself, left alone, begins a text with its BOS, as its model was trained.

        `add_bos_token` of its config decides, else what tokenizer.json adds; a bare SentencePiece model with
        a BOS adds it.
        """
        if self.bos_id is None:
            return False
        config = self.path.parent / "tokenizer_config.json"
        content = read_json(config) if config.is_file() else {}
        stated = content.get("add_bos_token") if isinstance(content, dict) else None
        if isinstance(stated, bool):
            return stated
        if self.path.suffix == ".model" and not config.is_file():
            return True
        return self._reference.encode("a", add_special_tokens=True).ids[0] == self.bos_id

    def encode(self, text: str, *, utf8: bytes | None = None) -> NDArray[np.uint32]:
        """Return the ids of a text [tokens]; `utf8` is the same text, for callers who have it anyway."""
        if self._fast is not None and utf8 is not None and len(text) <= PIECE_CHARACTERS["gigatoken"]:
            ids = self._fast(utf8)
            if ids is not None:
                return ids
        parts = list(self.encode_pieces(text))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_pieces(self, text: str) -> Iterator[NDArray[np.uint32]]:
        """Yield the ids of a text piece by piece, at least one, so that not all need be held as uint32."""
        characters = PIECE_CHARACTERS[self.backend]
        if len(text) <= characters or self._cuts is None:
            yield self._encode(text)
        else:
            for _, piece in self._cuts.pieces(text, characters):
                yield self._encode(piece)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text, on the calling thread."""
        return [self.encode(text) for text in texts]

    def encode_with_offsets(self, text: str) -> Offsets:
        """Return ids and character spans; always on the Hugging Face engine, about 0.4 million tokens/s."""
        pieces = [(0, text)] if self._cuts is None else self._cuts.pieces(text, PIECE_CHARACTERS["hf"])
        parts = [self._encode_with_offsets(piece, start) for start, piece in pieces]
        return Offsets(*map(np.concatenate, zip(*parts)))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens written out."""
        return self._reference.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """Return the id of one vocabulary entry, such as a special token, or None."""
        return self._reference.token_to_id(token)

    def _encode(self, text: str) -> NDArray[np.uint32]:
        if self._fast is None:
            return encode_reference(self._reference, text)
        ids = self._fast(text.encode())
        if ids is not None:
            return ids
        # Only the pieces that hold what the fast engine cannot encode are for the slow one.
        pieces = [(0, text)] if self._cuts is None else self._cuts.pieces(text, PIECE_CHARACTERS["hf"])
        parts = [(piece, self._fast(piece.encode())) for _, piece in pieces]
        return np.concatenate([
            encode_reference(self._reference, piece) if part is None else part for piece, part in parts
        ])  # fmt: skip

    def _encode_with_offsets(self, text: str, start: int) -> Offsets:
        encoding = self._reference.encode(text, add_special_tokens=False)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2) + start
        return Offsets(np.array(encoding.ids, np.uint32), spans[:, 0], spans[:, 1])


def encode_reference(reference: tokenizers.Tokenizer, text: str) -> NDArray[np.uint32]:
    """Return the ids of a text from the Hugging Face library."""
    # Without offsets: nobody asks for them here, and they cost a third of the time.
    encoding = reference.encode_batch_fast([text], add_special_tokens=False)[0]
    return np.array(encoding.ids, np.uint32)
