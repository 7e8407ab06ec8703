"""Published tokenizers rebuilt small: their steps and settings around a vocabulary trained here.

The vocabularies themselves are other people's and are not shipped. Which engine a tokenizer gets, and the ids of
a text given its vocabulary, depend on the steps, which are public.
"""

from __future__ import annotations

import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

SPACE = "\u2581"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA_3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
QWEN_3_5 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    f"{_BEFORE}{_UPPER}*{_LOWER}+{CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


class Published(NamedTuple):
    """A published tokenizer's structure."""

    make: Callable[[], tokenizers.Tokenizer]
    special: tuple[str, ...] = ("<|endoftext|>",)
    plain: tuple[str, ...] = ()
    """Added tokens that are matched in texts."""
    lacks: bytes = b""
    """Bytes without an entry in the vocabulary."""
    changes: tuple[tuple[str, bool], ...] = ()
    """Fields of each of them."""


def build(
    published: Published, texts: Iterable[str], *, vocab_size: int, across: bool = False
) -> dict[str, Any]:
    """Return a tokenizer.json of the published structure, its vocabulary trained on texts.

    `across`: words of the vocabulary stretch over where the steps split, so that any other split has other ids.
    """
    tokenizer = published.make()
    steps = json.loads(tokenizer.to_str())
    characters = tokenizer.model.byte_fallback
    if characters:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "never", split=not across)
    elif across:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    first = [f"<0x{byte:02X}>" for byte in range(256)] if characters else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", *published.special, *published.plain, *first],
        initial_alphabet=[] if characters else sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        limit_alphabet=1000,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    content |= {name: steps[name] for name in ("normalizer", "pre_tokenizer")}
    content["added_tokens"] = [
        {
            **token,
            **({"special": False, **dict(published.changes)} if token["content"] in published.plain else {}),
        }
        for token in content["added_tokens"]
        if token["content"] not in first
    ]
    return _without(content, published.lacks) if published.lacks else content


def _without(content: dict[str, Any], lacks: bytes) -> dict[str, Any]:
    """Take bytes, and what was merged from them, out of a byte-level vocabulary; ids close up."""
    # A byte stands for itself where it is printable, the others for the letters from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    gone = {chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in lacks}
    model = content["model"]
    kept = sorted((word for word in model["vocab"] if not gone & set(word)), key=model["vocab"].__getitem__)
    model["vocab"] = {word: number for number, word in enumerate(kept)}
    model["merges"] = [pair for pair in model["merges"] if not gone & set("".join(pair))]
    content["added_tokens"] = [
        {**token, "id": model["vocab"][token["content"]]} for token in content["added_tokens"]
    ]
    return content


def _byte_level(
    *splits: Any, normalizer: Any = None, ignore_merges: bool = False, regex: bool = False
) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, level]) if splits else level
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    return make


def _split(pattern: str, behavior: str = "isolated", *, invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert=invert)


def _characters(
    *, prepend: bool, pre_tokenizer: Any = None, metaspace: bool = False
) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        steps = [normalizers.Prepend(SPACE)] if prepend else []
        if not metaspace:
            tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return tokenizer

    return make


_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOOLS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
SMOLLM_LACKS = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)])

PUBLISHED: dict[str, Published] = {
    "GPT-2": Published(_byte_level(regex=True)),
    "SmolLM2, StarCoder 2": Published(_byte_level(_DIGITS, regex=True), _CHAT, lacks=SMOLLM_LACKS),
    "Command R": Published(_byte_level(_DIGITS, normalizer=normalizers.NFC(), regex=True)),
    "Llama 3": Published(_byte_level(_split(LLAMA_3), ignore_merges=True), ("<|begin_of_text|>", "<|eot_id|>")),
    "Qwen 2, 2.5": Published(_byte_level(_split(QWEN_2), normalizer=normalizers.NFC()), _CHAT),
    "Qwen 3": Published(_byte_level(_split(QWEN_2), normalizer=normalizers.NFC()), _CHAT, _TOOLS),
    "Qwen 3.5": Published(_byte_level(_split(QWEN_3_5), normalizer=normalizers.NFC()), _CHAT, _TOOLS),
    "Phi-4": Published(_byte_level(_split(LLAMA_3, "removed", invert=True)), _CHAT),
    "cl100k (GPT-4), as written": Published(_byte_level(_split(CL100K), ignore_merges=True)),
    "gpt-oss (o200k)": Published(
        _byte_level(_split(O200K, "removed", invert=True), ignore_merges=True), ("<|start|>", "<|end|>")
    ),
    "Mistral (Tekken)": Published(_byte_level(_split(TEKKEN), ignore_merges=True), ("<s>", "</s>", "[INST]")),
    "DeepSeek V3": Published(
        _byte_level(*map(_split, DEEPSEEK_V3), ignore_merges=True),
        ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    ),
    "Llama 2, Mistral v1": Published(_characters(prepend=True), ("<s>", "</s>")),
    "Llama 2, saved by transformers 5": Published(
        _characters(prepend=False, metaspace=True, pre_tokenizer=pre_tokenizers.Metaspace(SPACE, "first", split=False)),
        ("<s>", "</s>"),
    ),
    "Phi-3": Published(
        _characters(prepend=True), ("<s>", "<|user|>", "<|end|>"), ("</s>",), changes=(("rstrip", True),)
    ),
    "Gemma 3": Published(
        _characters(prepend=False, pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous")),
        ("<bos>", "<eos>", "<start_of_turn>"),
        ("\n\n", "\n\n\n", SPACE * 2, SPACE * 3, "<table>", "</table>"),
    ),
    "Falcon": Published(
        _byte_level(
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            _split("[0-9][0-9][0-9]"),
        )
    ),
}  # fmt: skip

VOCABULARY = 16_000
TRAINING, READ, READ_SLOWLY = 3_000_000, 12_000_000, 1_500_000


def main(folders: list[str]) -> None:
    """Print a table of engines and speeds."""
    from longspan.data.tokenizer import load_tokenizer

    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    text, size = [], 0
    for file in files:
        text.append(file.read_text(encoding="utf-8", errors="ignore"))
        size += len(text[-1])
        if size > READ:
            break
    training = [each for number, each in enumerate(text) if number % (READ // TRAINING) == 0]
    print(
        "| tokenizer | engine | MB/s | tokenizers, MB/s | faster | why slow |\n|---|---|---:|---:|---:|---|"
    )
    with tempfile.TemporaryDirectory() as work:
        named = {}
        for number, (name, each) in enumerate(PUBLISHED.items()):
            named[name] = Path(work, str(number))
            named[name].mkdir()
            content = build(each, training, vocab_size=VOCABULARY)
            (named[name] / "tokenizer.json").write_text(json.dumps(content))
        named |= {f"{Path(folder).name} (real)": Path(folder) for folder in folders}
        for name, folder in named.items():
            ours, reference = load_tokenizer(folder), load_tokenizer(folder, backend="hf")
            slow = _speed(reference.encode, text, READ_SLOWLY)
            fast = slow if ours.backend == "hf" else _speed(ours.encode, text, READ)
            reason = ours.backend_reason.rpartition(": ")[2] if ours.backend == "hf" else ""
            reason = reason.replace("|", "\\|")
            print(
                f"| {name} | {ours.backend} | {fast:.1f} | {slow:.2f} | {fast / slow:.0f}x | {reason[:60]} |"
            )


def _speed(encode: Callable[[str], Any], texts: list[str], limit: int) -> float:
    """Return MB per CPU-second of the first texts, `limit` characters in all."""
    size, start = 0, time.process_time()
    for text in texts:
        encode(text)
        size += len(text)
        if size > limit:
            break
    return size / 1e6 / (time.process_time() - start)


if __name__ == "__main__":
    main(sys.argv[1:])
