"""Tokenizers for conversations, ours and the same one as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from longspan.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|im_start|>",
    "<|im_end|>",
]


def chatty_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer that knows the special tokens of all shipped templates."""
    texts = ["Hello there, so long! Be brief. user assistant system INST"] * 20
    return train_bpe(texts, folder, vocab_size=300, special_tokens=SPECIAL)


def llama_like(folder: Path, *, legacy: bool) -> Tokenizer:
    """Write a SentencePiece-style tokenizer: every stretch, or only the first, begins with a space mark."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if legacy:
        model.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    alphabet = sorted(set("\u2581 abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ[]/.!?<>|_\n"))
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    model.train_from_iterator(["Hello there so long be brief INST"] * 20, trainer)
    model.add_special_tokens([AddedToken("<|im_end|>", rstrip=True), AddedToken("<|im_start|>", lstrip=True)])
    model.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    return load_tokenizer(folder, backend="hf")


def hugging_face(tokenizer: Tokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path), bos_token="<s>", eos_token="</s>")
