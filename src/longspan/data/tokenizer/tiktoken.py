"""tiktoken rank files as the content of a tokenizer.json, without the tiktoken package.

Each line is a token in base64 and its rank. The expression that splits texts is not in the file: it is known
by name (cl100k, o200k, llama-3, gpt2) or given after a `#`: `tokenizer.model#llama-3`, `ranks.tiktoken#\\s+|\\S+`.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import ArgumentError, DataError
from longspan.data.tokenizer.safe_cuts import added_token


class Encoding(NamedTuple):
    """How a published rank file is used."""

    pattern: str
    special: dict[str, int]
    """Special tokens: how far behind the last rank their ids stand (1 = the next id)."""


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS + "?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS + "?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>"]
_LLAMA_3 += [f"<|reserved_special_token_{number}|>" for number in range(4)]
_LLAMA_3 += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
_LLAMA_3 += [f"<|reserved_special_token_{number}|>" for number in range(5, 251)]

ENCODINGS: dict[str, Encoding] = {
    "cl100k": Encoding(
        _CL100K,
        {
            "<|endoftext|>": 2,
            "<|fim_prefix|>": 3,
            "<|fim_middle|>": 4,
            "<|fim_suffix|>": 5,
            "<|endofprompt|>": 21,
        },
    ),
    "o200k": Encoding(_O200K, {"<|endoftext|>": 2, "<|endofprompt|>": 21}),
    "llama-3": Encoding(_CL100K, {token: number for number, token in enumerate(_LLAMA_3, 1)}),
    "gpt2": Encoding(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", {"<|endoftext|>": 1}
    ),
}
_ALIASES = {"llama3": "llama-3", "r50k": "gpt2", "p50k": "gpt2"}


def is_rank_file(data: bytes) -> bool:
    """Whether a file begins with a line of base64 and a number."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data) is not None


def read_ranks(data: bytes, *, where: Path) -> dict[bytes, int]:
    """Parse a rank file. Raises DataError naming the line that is wrong."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{where}:{number} is not a token in base64 and its rank", found=repr(line[:60])
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise DataError(
            f"{where} is not a complete rank file",
            found=f"{len(missing)} bytes without a rank" if missing else "a rank twice, or below zero",
        )
    return ranks


def find_encoding(pattern: str, *, path: Path) -> Encoding:
    """Return the encoding of a name or an expression, or of a file's name where `pattern` is empty.

    Raises:
        ArgumentError: neither says how texts are split.
    """
    if not pattern:
        named = [name for name in (*ENCODINGS, *_ALIASES) if path.name.lower().startswith(name)]
        if not named:
            raise ArgumentError(
                f"{path} holds the ranks of tiktoken, and not how texts are split",
                fix=f"add a name or an expression: {path}#llama-3",
                allowed=list(ENCODINGS),
            )
        pattern = named[0]
    pattern = _ALIASES.get(pattern, pattern)
    return ENCODINGS.get(pattern) or Encoding(pattern, {})


def to_tokenizer_json(ranks: dict[bytes, int], encoding: Encoding) -> dict[str, Any]:
    """Return the content of a tokenizer.json that gives the same ids; about 1 s for 128 thousand ranks."""
    letters = byte_letters()
    names = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    merges: list[list[str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
            # Where several pairs make the same token, tiktoken takes whichever stands there.
            pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
            merges += [[names[left], names[right]] for left, right in pairs]
    last = max(ranks.values())
    vocab = {names[token]: rank for token, rank in ranks.items()}
    special = {token: last + distance for token, distance in encoding.special.items()}
    split = {"type": "Split", "pattern": {"Regex": encoding.pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(number, token, special=True) for token, number in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # A part of the text that is a token itself is never merged from bytes.
            "ignore_merges": True,
            "vocab": vocab | special,
            "merges": merges,
        },
    }


def byte_letters() -> list[str]:
    """Return the letter that stands for each byte in byte-level vocabularies: itself where it is printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
