"""Text to token ids, from a `tokenizer.json`, on one of two engines that give the same ids.

gigatoken is the fast engine (35 million tokens/s on one core where the Hugging Face library makes 0.4
million); it is compared with the Hugging Face library on a sample of awkward text whenever a tokenizer is
loaded, and steps aside on any difference. Special tokens written out in a text, `<|eos|>` say, are ordinary
text to both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import read_json, sha256_bytes, write_json
from longspan.core.log import log_once

Backend = Literal["gigatoken", "hf"]
ROLES = ("bos", "eos", "pad")
FAST_ENGINE_CHARACTERS = 1 << 28

# What the roles are called where no config names them.
COMMON_NAMES: dict[str, tuple[str, ...]] = {
    "bos": ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
    "eos": ("<|eos|>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
}

# Texts on which engines are known to disagree; the tokenizer's own special tokens are added to them.
SAMPLE: tuple[str, ...] = (
    "",
    " ",
    "a",
    "Hello, world! It's HE'LL they'Re 'tis",
    "  leading, trailing  \n\n\n\tand\r\nmixed \u00a0\u2003 space \n",
    " " * 300 + "x" + "\n" * 40 + "\t" * 33,
    "0 1 12 123 1234 12345678901234567890 3.14159 1,000,000 0x7fff \u0663\u0664 \u00bd \u2167 \u00b2",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0966 \u0967\u0968\u0969 \u0915\u094d\u0937",
    "\u0924\u094d\u0930\u093f\u092f \u0ba4\u0bae\u0bbf\u0bb4\u0bcd",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f",
    "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\U0001f44d\U0001f3fd \u2764\ufe0f \U0001f642\U0001f642",
    "zero\u200bwidth\u200djoin\ufeffmark \u00e9 e\u0301 \u00c5 \u212b \ufb01 \u0130\u0131 \u1e9e\u00df",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0e44\u0e17\u0e22",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u03b5\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac",
    'def f(x: int) -> str:\n    """Doc."""\n    return f"{x!r:>{10}}" if x != 0 else \'\'  # \\n\n',
    "<html><body class='a'>&nbsp;</body></html> https://example.org/a?b=c&d=%20#e user@host.tld",
    "<s> </s> <unk> <pad> <|endoftext|> <|im_start|>user<|im_end|>",
    "[INST] [CLS]<0x0A>\x00\x01\x7f\x80\ufffd",
    "CamelCase snake_case kebab-case SCREAMING.dot/slash\\back ~~~ ``` === ---- ...... !!!???",
    "$$$ \u2014 \u2026 \u201cquoted\u201d",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u2581 \u2581\u2581word \u0120 \u010a",
)

# One digit a token; contractions, words, punctuation and white space as in published byte-level tokenizers.
SPLIT_DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GROUP_DIGITS = SPLIT_DIGITS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


class Offsets(NamedTuple):
    """Ids of a text with the characters each stands for."""

    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    """One after the last character. A token that is part of a character covers the whole character."""


class _FastEngine:
    """gigatoken, made anew every 268 million characters.

    It remembers every word it has met: text without a repeated word costs 6 bytes of memory a character, and
    would fill any machine in time. Making it anew takes 0.1 s for 32 thousand ids.
    """

    def __init__(self, content: str) -> None:
        self._content = content
        self._start()

    def __call__(self, text: str) -> NDArray[np.uint32]:
        self._characters_left -= len(text)
        if self._characters_left < 0:
            self._start()
        return self._encode(text)

    def _start(self) -> None:
        import gigatoken

        self._encode = gigatoken.Tokenizer.from_json(self._content).encode
        self._characters_left = FAST_ENGINE_CHARACTERS


class Tokenizer:
    """A tokenizer.json, ready to encode; made by `load_tokenizer`. Adds no special tokens on its own."""

    def __init__(
        self,
        path: Path,
        *,
        fingerprint: str,
        special_ids: Mapping[str, int | None],
        reference: tokenizers.Tokenizer,
        fast: _FastEngine | None,
        backend_reason: str,
    ) -> None:
        self.path = path
        """The tokenizer.json."""
        self.fingerprint = fingerprint
        """SHA-256 of everything in the file that decides the ids of a text."""
        self.bos_id, self.eos_id, self.pad_id = (special_ids[role] for role in ROLES)
        self.vocab_size = max(reference.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id, special tokens included."""
        self.backend: Backend = "hf" if fast is None else "gigatoken"
        self.backend_reason = backend_reason
        """Why this engine was taken."""
        self._reference, self._fast = reference, fast

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Return the ids of a text [tokens]."""
        return _encode_reference(self._reference, text) if self._fast is None else self._fast(text)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the ids of each text, on the calling thread."""
        return [self.encode(text) for text in texts]

    def encode_with_offsets(self, text: str) -> Offsets:
        """Return ids and character spans; always on the Hugging Face engine, about 0.4 million tokens/s."""
        encoding = self._reference.encode(text, add_special_tokens=False)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return Offsets(np.array(encoding.ids, np.uint32), spans[:, 0], spans[:, 1])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens written out."""
        return self._reference.decode([int(token) for token in ids], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """Return the id of one vocabulary entry, such as a special token, or None."""
        return self._reference.token_to_id(token)


def load_tokenizer(name: str | os.PathLike[str], *, backend: Backend | None = None) -> Tokenizer:
    """Load a tokenizer from a tokenizer.json, a folder holding one, or a name on the Hugging Face hub.

    Args:
        backend: None takes gigatoken where it gives the same ids as the Hugging Face library.

    Raises:
        DataError: there is no such file, folder or hub name, or the file is not a tokenizer.json.
        ArgumentError: `backend="gigatoken"`, and it cannot load this tokenizer or gives other ids.
    """
    path = _find_json(os.fspath(name))
    content = read_json(path)
    try:
        reference = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # noqa: BLE001  the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json that can be read", found=str(error)) from None
    # Truncation or padding saved with a tokenizer would cut or fill documents without a word.
    reference.no_truncation()
    reference.no_padding()
    reference.encode_special_tokens = True
    fast, reason = (None, "asked for") if backend == "hf" else _load_fast(content, reference)
    if backend == "gigatoken" and fast is None:
        raise ArgumentError(f"gigatoken cannot be used for {path}", found=reason, allowed="backend hf")
    tokenizer = Tokenizer(
        path,
        fingerprint=_fingerprint(content),
        special_ids=_special_ids(path.parent, reference),
        reference=reference,
        fast=fast,
        backend_reason=reason,
    )
    if backend is None:
        log_once("data.tokenizer", f"{path}: {tokenizer.backend} engine ({reason})")
    return tokenizer


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


def _find_json(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if path.is_file():
        return path
    hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) and not name.endswith(".json")
    if Path(name).exists() or not hub_name:
        raise DataError(
            f"no tokenizer at {name}",
            found=f"no file {path}",
            fix="give a tokenizer.json, a folder that holds one, or a name on the hub such as org/model",
        )
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
    except (HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer at {name}: no such file or folder, and the hub gave none",
            found=str(error).strip().splitlines()[0],
            fix="check the name and the connection, or point at a local tokenizer.json",
        ) from None
    for optional in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            hf_hub_download(name, optional)
        except (HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError):
            continue
    return path


def _load_fast(content: dict[str, Any], reference: tokenizers.Tokenizer) -> tuple[_FastEngine | None, str]:
    """Return gigatoken's engine and why it is taken, or None and why not."""
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        return None, f"gigatoken cannot be imported: {error}"
    special = [token["content"] for token in content.get("added_tokens") or [] if token.get("special")]
    # Without its special tokens gigatoken takes them for text. Added tokens that are not special stay
    # matched.
    plain = {**content, "truncation": None, "padding": None, "post_processor": None}
    plain["added_tokens"] = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    try:
        fast = _FastEngine(json.dumps(plain))
        for text in (*SAMPLE, *special, "x".join(special), f"a {' '.join(special)}\n", " ".join(SAMPLE)):
            if not np.array_equal(fast(text), _encode_reference(reference, text)):
                return None, f"gigatoken gives other ids for {text[:40]!r}"
    except Exception as error:  # noqa: BLE001  whatever a fast path meets, the slow one is there
        return None, f"gigatoken refuses this tokenizer: {str(error).splitlines()[0]}"
    return fast, "same ids as the Hugging Face library on the sample"


def _encode_reference(reference: tokenizers.Tokenizer, text: str) -> NDArray[np.uint32]:
    return np.array(reference.encode(text, add_special_tokens=False).ids, np.uint32)


def _fingerprint(content: dict[str, Any]) -> str:
    """Hash what decides the ids: model, normalizer, pre-tokenizer, added tokens; decoders and templates do
    not.

    Settings that are null or false count as absent, and merges as pairs, so saving a file anew with another
    version of the library, which writes out defaults, keeps the fingerprint.
    """
    model = {name: value for name, value in content["model"].items() if value not in (None, False)}
    merges = model.get("merges") or []
    model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
    parts = [
        model,
        content.get("normalizer"),
        content.get("pre_tokenizer"),
        content.get("added_tokens") or [],
    ]
    return sha256_bytes(json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode())


def _special_ids(folder: Path, reference: tokenizers.Tokenizer) -> dict[str, int | None]:
    """Return the ids of BOS, EOS and padding, named by a config or else by a common name, or None."""
    names: dict[str, Any] = {}
    configs = [folder / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    for file in filter(Path.is_file, configs):
        content = read_json(file)
        if isinstance(content, dict):
            names |= {name: value for name, value in content.items() if name.endswith("_token") and value}
    ids: dict[str, int | None] = {}
    for role in ROLES:
        named = names.get(f"{role}_token")
        text = named.get("content") if isinstance(named, dict) else named
        if any(map(Path.is_file, configs)):
            ids[role] = reference.token_to_id(text) if isinstance(text, str) else None
        else:
            known = (reference.token_to_id(name) for name in COMMON_NAMES[role])
            ids[role] = next((number for number in known if number is not None), None)
    return ids
