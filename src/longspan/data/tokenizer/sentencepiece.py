"""SentencePiece `.model` files as the content of a tokenizer.json, without the sentencepiece package.

The file is a protocol buffer; the few fields that decide ids are read by hand. BPE and unigram models are
known, with byte fallback. User-defined pieces are matched in texts, control pieces (`<s>`) are not.

One difference is known: where a model has user-defined pieces, a space at the very start of a text is not
kept in addition to the space that SentencePiece puts there.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import DataError
from longspan.data.tokenizer.safe_cuts import SPACE, added_token

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class VocabPiece(NamedTuple):
    """One entry of the vocabulary; its id is its place in the file."""

    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """What of a SentencePiece model decides ids."""

    pieces: list[VocabPiece]
    kind: int
    unknown: int
    roles: dict[str, int]
    """Ids of bos, eos and pad; below zero where there is none."""
    charsmap: bytes
    """Compiled character replacements; empty: none."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(data: bytes, *, where: Path) -> Model:
    """Parse a model file.

    Raises:
        DataError: it is not a SentencePiece model, or of a kind other than BPE and unigram.
    """
    pieces: list[VocabPiece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                fields = dict(_fields(value))
                score = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))[0]
                pieces.append(VocabPiece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        kind = trainer.get(3, UNIGRAM)
        defaults = {"bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
        roles = {role: _signed(trainer.get(number, default)) for role, (number, default) in defaults.items()}
        model = Model(
            pieces,
            kind,
            unknown=_signed(trainer.get(40, 0)),
            roles=roles,
            charsmap=normalizer.get(2, b""),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        )
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise DataError(f"{where} is not a SentencePiece model", found=str(error)) from None
    if not pieces or not 0 <= model.unknown < len(pieces):
        raise DataError(f"{where} is not a SentencePiece model", found=f"{len(pieces)} pieces")
    if kind not in (UNIGRAM, BPE) or trainer.get(24):
        raise DataError(f"{where}: this kind of SentencePiece model is not known", allowed="BPE or unigram")
    return model


def to_tokenizer_json(model: Model) -> dict[str, Any]:
    """Return the content of a tokenizer.json that gives the same ids."""
    user_defined = any(piece.kind == USER_DEFINED for piece in model.pieces)
    whole_text = model.kind == BPE and not user_defined
    normalizers: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.remove_extra_whitespaces:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    pre_tokenizer: dict[str, Any] | None = None
    if whole_text:
        if model.add_dummy_prefix:
            normalizers.append({"type": "Prepend", "prepend": SPACE})
        normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    else:
        # "first": a text is cut at user-defined pieces, and only its first part gets the space.
        scheme = "first" if model.add_dummy_prefix else "never"
        split = model.kind == UNIGRAM
        pre_tokenizer = {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": scheme,
            "split": split,
        }
    sequence = {"type": "Sequence", "normalizers": normalizers}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(number, piece.text, special=piece.kind != USER_DEFINED)
            for number, piece in enumerate(model.pieces)
            if piece.kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ],
        "normalizer": sequence if normalizers else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": _decoder(model.add_dummy_prefix),
        "model": _bpe(model) if model.kind == BPE else _unigram(model),
    }


def _bpe(model: Model) -> dict[str, Any]:
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    merges = [
        (piece.text[:cut], piece.text[cut:])
        for piece in sorted(model.pieces, key=lambda piece: -piece.score)
        if piece.kind == NORMAL
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in scores and piece.text[cut:] in scores
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[model.unknown].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": any(piece.kind == BYTE for piece in model.pieces),
        "ignore_merges": False,
        "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
        "merges": [list(pair) for pair in merges],
    }


def _unigram(model: Model) -> dict[str, Any]:
    # A piece that is never chosen: no path through it can win.
    lowest = min(piece.score for piece in model.pieces) - 1e4
    usable = (NORMAL, USER_DEFINED)
    return {
        "type": "Unigram",
        "unk_id": model.unknown,
        "vocab": [[p.text, p.score if p.kind in usable else lowest] for p in model.pieces],
        "byte_fallback": any(piece.kind == BYTE for piece in model.pieces),
    }


def _decoder(add_dummy_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protocol buffer message: int, or bytes of fixed or given length."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value: Any
            value, place = _varint(data, place)
        else:
            size = {1: 8, 5: 4}.get(kind)
            if kind == 2:
                size, place = _varint(data, place)
            if size is None or place + size > len(data):
                raise ValueError(f"wrong field at byte {place}")
            value, place = data[place : place + size], place + size
        yield tag >> 3, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError(f"wrong number at byte {place}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
