"""Finding and reading tokenizers: tokenizer.json, SentencePiece models, ranks of tiktoken, names on the hub."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import tokenizers

import longspan
from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import read_json, sha256_bytes
from longspan.core.hub import look_for_hub
from longspan.core.log import get_logger, log_once
from longspan.data.tokenizer import sentencepiece, tiktoken
from longspan.data.tokenizer.engine import Backend, Findings, FoundOut, Tokenizer, encode_reference
from longspan.data.tokenizer.fast import FastEngine, NotFastError, Recipe, check_merges, make_recipe
from longspan.data.tokenizer.remembered import recall, remember
from longspan.data.tokenizer.roles import CONFIGS, special_ids, with_named_special
from longspan.data.tokenizer.safe_cuts import CutRule, cut_rule

NO_IMPORT = "gigatoken cannot be imported"
SHORT_NAMES = {"llama2": "meta-llama/Llama-2-7b-hf", "llama3": "meta-llama/Meta-Llama-3-8B"}
"""Names of datatools, which holds copies of these tokenizers: the same ids."""
JSON_NAME, MODEL_NAME = "tokenizer.json", "tokenizer.model"

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


class _Found(NamedTuple):
    """A tokenizer file that was read."""

    path: Path
    pattern: str
    """What stands after the `#` of the name."""
    digest: str
    """SHA-256 of the file, of what stands after the `#`, and of the configs beside it."""
    content: dict[str, Any]
    """As in a tokenizer.json."""
    roles: dict[str, str | None] | None
    """Names of bos, eos and pad that the file itself gives."""


def load_tokenizer(name: str | os.PathLike[str], *, backend: Backend | None = None) -> Tokenizer:
    """Load a tokenizer from a file, a folder, or a name on the Hugging Face hub.

    A file is a tokenizer.json, a SentencePiece model (`tokenizer.model`), or ranks of tiktoken, whose
    splitting is known by the file's name (`cl100k_base.tiktoken`) or given: `tokenizer.model#llama-3`, or an
    expression after the `#`. A folder or hub name holds a tokenizer.json or else a tokenizer.model. `llama2` and
    `llama3` stand for the hub names of `SHORT_NAMES` where there is no such file.

    Args:
        backend: None takes gigatoken where it gives the same ids as the Hugging Face library.

    Raises:
        DataError: there is no such file, folder or hub name, or the file is none of these.
        ArgumentError: `backend="gigatoken"`, and it cannot load this tokenizer or gives other ids; or ranks
            of tiktoken come without the expression that splits texts.
    """
    found = _read(os.fspath(name))
    reference = cache(partial(_load_reference, found))
    known = None if backend == "hf" else recall(found.digest)
    fast = None
    if known is not None and known.backend == "gigatoken":
        try:
            fast = FastEngine(_recipe(found, known.vocab_size, reference))
        except Exception:  # noqa: BLE001  not as it was found: it is found out anew
            known = None
    new = known is None
    if known is None:
        known, fast = _find_out(found, reference, only_hf=backend == "hf")
    if backend == "gigatoken" and fast is None:
        raise ArgumentError(
            f"gigatoken cannot be used for {found.path}", found=known.backend_reason, allowed="backend hf"
        )
    if backend != "hf":
        log_once(
            "data.tokenizer",
            f"{found.path}: {known.backend} engine ({known.backend_reason}{'' if new else ', as found out before'})",
        )
        if new and not known.backend_reason.startswith(NO_IMPORT):
            remember(found.digest, known)
    for note in known.notes:
        get_logger("data.tokenizer").warning(f"{found.path}: {note}")
    return _tokenizer(found, known, reference, fast)


def _find_out(
    found: _Found, reference: Callable[[], tokenizers.Tokenizer], *, only_hf: bool
) -> tuple[FoundOut, FastEngine | None]:
    model = reference()
    size = _vocab_size(found.content, model)
    fast, reason = (None, "asked for") if only_hf else _load_fast(found, size, reference)
    ids, notes = special_ids(found.path, model, found.roles)
    known = FoundOut(
        fingerprint=_fingerprint(found.content),
        vocab_size=size,
        special_ids=ids,
        backend="hf" if fast is None else "gigatoken",
        backend_reason=reason,
        cuts=_rule_holds(cut_rule(found.content), model),
        notes=tuple(notes),
    )
    return known, fast


def reload_tokenizer(findings: Findings) -> Tokenizer:
    """Load a tokenizer that another process has loaded and checked.

    On the same machine the engines are not compared once more, and the Hugging Face one is made when it is
    asked for; elsewhere, or where the file is another by now, all is done again.
    """
    found = _read(findings.name)
    if found.digest != findings.digest or findings.machine != _machine():
        return load_tokenizer(findings.name, backend=findings.known.backend)
    reference = cache(partial(_load_reference, found))
    fast = None
    if findings.known.backend == "gigatoken":
        fast = FastEngine(_recipe(found, findings.known.vocab_size, reference))
    return Tokenizer(found.path, findings, reference=reference, fast=fast, reload=_reload)


@lru_cache(maxsize=4)
def _reload(findings: Findings) -> Tokenizer:
    """Return what a pickled tokenizer stands for, loaded once in each process."""
    return reload_tokenizer(findings)


def _tokenizer(
    found: _Found, known: FoundOut, reference: Callable[[], tokenizers.Tokenizer], fast: FastEngine | None
) -> Tokenizer:
    findings = Findings(
        name=f"{found.path}#{found.pattern}" if found.pattern else str(found.path),
        machine=_machine(),
        digest=found.digest,
        known=known,
        cuts=cut_rule(found.content) if known.cuts else None,
    )
    return Tokenizer(found.path, findings, reference=reference, fast=fast, reload=_reload)


def _machine() -> str:
    """Return what tells this machine, and what runs on it, from another."""
    return " ".join(
        (platform.node(), platform.machine(), platform.release(), sys.executable, longspan.__version__)
    )


def _load_reference(found: _Found) -> tokenizers.Tokenizer:
    try:
        reference = tokenizers.Tokenizer.from_buffer(orjson.dumps(found.content))
    except Exception as error:  # noqa: BLE001  the library raises bare Exception
        raise DataError(f"{found.path} is not a tokenizer that can be read", found=str(error)) from None
    # Truncation or padding saved with a tokenizer would silently cut or fill documents.
    reference.no_truncation()
    reference.no_padding()
    reference.encode_special_tokens = True
    return reference


def _read(name: str) -> _Found:
    path, pattern = _find_file(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read", found=error.strerror) from None
    digest = hashlib.sha256(data + b"\0" + pattern.encode())
    for config in (path.parent / each for each in CONFIGS):
        digest.update(b"\0" + config.read_bytes() if config.is_file() else b"\0")
    make = partial(_Found, path, pattern, digest.hexdigest())
    if path.suffix == ".json" or data.lstrip()[:1] == b"{":
        try:
            content = orjson.loads(data)
        except orjson.JSONDecodeError:
            content = read_json(path)  # reads more, and says what is wrong
        try:
            return make(with_named_special(content, path.parent), None)
        except (AttributeError, TypeError):
            raise DataError(f"{path} is not a tokenizer that can be read") from None
    if tiktoken.is_rank_file(data):
        encoding = tiktoken.find_encoding(pattern, path=path)
        ranks = tiktoken.read_ranks(data, where=path)
        return make(tiktoken.to_tokenizer_json(ranks, encoding), None)
    model = sentencepiece.read_model(data, where=path)
    roles = {
        role: model.pieces[number].text if 0 <= number < len(model.pieces) else None
        for role, number in model.roles.items()
    }
    return make(sentencepiece.to_tokenizer_json(model), roles)


def _find_file(name: str) -> tuple[Path, str]:
    """Return the file and what stands after the `#` of its name."""
    stem, _, pattern = name.partition("#")
    for path in (Path(name), Path(stem)):
        if path.is_dir():
            inside = [path / each for each in (JSON_NAME, MODEL_NAME) if (path / each).is_file()]
            path = inside[0] if inside else path / JSON_NAME
        if path.is_file():
            return path, pattern
    hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", stem)
    if Path(stem).exists() or not hub_name or stem.endswith((".json", ".model", ".tiktoken")):
        raise DataError(
            f"no tokenizer at {name}",
            found=f"no file {stem}" if not Path(stem).is_dir() else f"no {JSON_NAME} in {stem}",
            fix="give a tokenizer.json, a SentencePiece .model, a .tiktoken file, a folder that holds one, "
            "or a name on the hub such as org/model",
        )
    return _download(SHORT_NAMES.get(stem, stem)), pattern


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    look_for_hub()
    try:
        try:
            path = Path(hf_hub_download(name, JSON_NAME))
        except EntryNotFoundError:
            path = Path(hf_hub_download(name, MODEL_NAME))
    except (HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer at {name}: no such file or folder, and the hub gave none",
            found=str(error).strip().splitlines()[0],
            fix="check the name and the connection, or point at a local tokenizer.json",
        ) from None
    for optional in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        try:
            hf_hub_download(name, optional)
        except (HfHubHTTPError, EntryNotFoundError, LocalEntryNotFoundError, OSError):
            continue
    return path


def _rule_holds(rule: CutRule | None, reference: tokenizers.Tokenizer) -> bool:
    """Return whether the sample, cut wherever the rule says, has the ids of the whole."""
    if rule is None:
        return False
    text = " and then ".join(SAMPLE) + " the end"
    pieces = [encode_reference(reference, piece) for _, piece in rule.pieces(text, 1)]
    return len(pieces) > 2 and np.array_equal(np.concatenate(pieces), encode_reference(reference, text))


def _load_fast(
    found: _Found, vocab_size: int, reference: Callable[[], tokenizers.Tokenizer]
) -> tuple[FastEngine | None, str]:
    """Return gigatoken's engine and why it is taken, or None and why not."""
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        return None, f"{NO_IMPORT}: {error}"
    try:
        check_merges(found.content["model"])
        fast = FastEngine(_recipe(found, vocab_size, reference))
        for text in _sample(found.content):
            ids = fast(text.encode())
            if ids is not None and not np.array_equal(ids, encode_reference(reference(), text)):
                return None, f"gigatoken gives other ids for {text[:40]!r}"
    except NotFastError as error:
        return None, f"gigatoken is not known to give the same ids: {error}"
    except Exception as error:  # noqa: BLE001  whatever a fast path meets, the slow one is there
        return None, f"gigatoken refuses this tokenizer: {str(error).splitlines()[0]}"
    return fast, "same ids as the Hugging Face library on the sample"


def _recipe(found: _Found, vocab_size: int, reference: Callable[[], tokenizers.Tokenizer]) -> Recipe:
    return make_recipe(found.content, first_mark=vocab_size, reference=reference)


def _sample(content: dict[str, Any]) -> Iterator[str]:
    """Yield texts on which engines may disagree, for this tokenizer."""
    added = content.get("added_tokens") or []
    special = [token["content"] for token in added if token.get("special")]
    plain = [token["content"] for token in added if not token.get("special")]
    yield from SAMPLE
    yield from special
    yield from ("x".join(special), f"a {' '.join(special)}\n", " ".join(SAMPLE))
    yield from ("x".join(plain), f"a  {'  '.join(plain)}\n", "\n".join((*plain, *plain)))


def _vocab_size(content: dict[str, Any], reference: tokenizers.Tokenizer) -> int:
    """Return one more than the largest id; the library's own vocabulary is not built for that."""
    vocab = content["model"]["vocab"]
    largest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
    return max(largest, *reference.get_added_tokens_decoder(), -1) + 1


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
