"""Training a byte-level BPE tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from longspan.core.errors import ArgumentError
from longspan.core.files import write_json
from longspan.data.tokenizer.engine import ROLES, Tokenizer
from longspan.data.tokenizer.loading import load_tokenizer

# One digit a token; contractions, words, punctuation and white space as in published byte-level tokenizers.
SPLIT_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GROUP_DIGITS = SPLIT_DIGITS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def train_bpe(
    texts: Iterable[str],
    out_dir: str | os.PathLike[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = ("<|bos|>", "<|eos|>", "<|pad|>"),
    split_digits: bool = True,
) -> Tokenizer:
    """Train a byte-level BPE tokenizer and write it as a folder that `AutoTokenizer` and `load_tokenizer`
    read.

    The same texts give the same file, byte for byte. `tokenizer.json` is written last.

    Args:
        vocab_size: ids in all: special tokens, 256 bytes, merges. Fewer if the texts run out of pairs.
        special_tokens: BOS, EOS and padding, in this order, then any others; they get the first ids.
        split_digits: every digit is a token of its own; else up to three digits may join.

    Raises:
        ArgumentError: the vocabulary cannot hold the bytes, or special tokens are missing or repeated.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    if len(special_tokens) < len(ROLES) or len(set(special_tokens)) < len(special_tokens):
        raise ArgumentError(
            "special tokens must name BOS, EOS and padding, each once", found=", ".join(special_tokens)
        )
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ArgumentError("vocabulary too small", found=vocab_size, allowed=f"at least {smallest}")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_DIGITS if split_digits else GROUP_DIGITS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    folder = Path(out_dir)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{role}_token": token for role, token in zip(ROLES, special_tokens)}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "tokenizer.json", json.loads(model.to_str()))
    return load_tokenizer(folder)
