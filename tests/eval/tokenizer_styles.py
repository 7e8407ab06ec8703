"""Small tokenizers built like published ones: Llama 2, Llama 3, Qwen."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from longspan.data.tokenizer import Tokenizer, load_tokenizer
from longspan.data.tokenizer.training import GROUP_DIGITS, SPLIT_DIGITS

STYLES = ("llama-2", "llama-3", "qwen")
TEXTS = [
    "The magic number of key is 12345.\nThe best thing to do is eat a sandwich on a sunny day.\n",
    "The special magic Singapore number is: 1234567. What is the number of the river and the stone?\n",
] * 5


def build_tokenizer(style: str, folder: Path) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json of a style and load them."""
    folder.mkdir(parents=True, exist_ok=True)
    model, config = _llama2() if style == "llama-2" else _byte_level(style)
    (folder / "tokenizer.json").write_text(model.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def _llama2() -> tuple[tokenizers.Tokenizer, dict[str, object]]:
    # SentencePiece BPE: byte fallback, a space in front of every text, one digit a token, no pre-tokenizer.
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    characters = sorted(set("".join(TEXTS).replace(" ", "\u2581")) | set("0123456789") - {"\n"})
    pieces += [character for character in characters if character != "\n"]
    merges: list[tuple[str, str]] = []
    for word in ("\u2581is", "\u2581number", "\u2581The", "\u2581magic", "\u2581of", "\u2581the"):
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    model = tokenizers.Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return model, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}


def _byte_level(style: str) -> tuple[tokenizers.Tokenizer, dict[str, object]]:
    llama3 = style == "llama-3"
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=llama3))
    if not llama3:
        model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GROUP_DIGITS if llama3 else SPLIT_DIGITS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    specials = (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        if llama3
        else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    if not llama3:
        return model, {"eos_token": "<|endoftext|>", "bos_token": None}
    bos = specials[0]
    model.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, model.token_to_id(bos))]
    )
    return model, {"bos_token": bos, "eos_token": "<|end_of_text|>"}
