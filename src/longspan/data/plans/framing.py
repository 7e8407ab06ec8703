"""Which special tokens stand around the documents of token stores: settled here, put there by packing.

A store holds text only. A model whose tokenizer begins texts with BOS was trained so, and reads a text without it much
worse: `auto` begins documents as the tokenizer itself would. A conversation begins as its chat template has it, and no
document gets a second BOS, and where all end with EOS none gets a second EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from longspan.core.errors import ConfigError
from longspan.core.log import get_logger, log_once
from longspan.data.plans.pack_config import PackConfig
from longspan.data.store import TokenStore

__all__ = ["Framing", "frame_settings", "frame_words", "text_bos"]

Framing = Literal["auto", "none", "bos", "eos", "both"]
LOOKED_AT = 64
"""Documents of a store whose first token is looked at."""


def frame_settings(wanted: Framing, stores: Sequence[TokenStore], *, where: str) -> dict[str, Any]:
    """Return `specials`, `bos_id` and `eos_id` of a `PackConfig` for the documents of some stores.

    Raises:
        ConfigError: a token that the tokenizer has not, or BOS for some of the stores only.
    """
    tokenizer = stores[0].manifest.tokenizer
    if wanted == "auto":
        begin = [text_bos(store) is not None for store in stores]
        wanted = "bos" if all(begin) else "none"
        uneven = any(begin) and not all(begin)
    else:
        begun = [wanted in ("bos", "both") and _begins_with_bos(store) for store in stores]
        uneven = any(begun) and not all(begun)
        if all(begun):
            get_logger("data").info("%s: its documents begin with BOS already and get no second one", where)
            wanted = "eos" if wanted == "both" else "none"
        if wanted in ("eos", "both") and all(_ends_with_eos(store) for store in stores):
            get_logger("data").info("%s: its documents end with EOS already and get no second one", where)
            wanted = "bos" if wanted == "both" else "none"
    if uneven:
        raise ConfigError(
            f"{where} mixes documents that begin as they stand, such as conversations, with texts that begin with BOS",
            found=", ".join(str(store.path) for store in stores),
            fix="pack them apart (a stream for each), or set specials for all of them",
        )
    roles = {"none": (), "both": ("bos", "eos")}.get(wanted, (wanted,))
    missing = [role for role in roles if tokenizer.get(f"{role}_id") is None]
    if missing:
        raise ConfigError(
            f"{where} wants {wanted} around documents, but the tokenizer has no {' and no '.join(missing)}",
            fix="set specials to what the tokenizer has, or none",
        )
    return {"specials": wanted, **{f"{role}_id": tokenizer[f"{role}_id"] for role in roles}}


def text_bos(store: TokenStore) -> int | None:
    """Return the BOS with which the documents of a store are read; None: they begin as they stand.

    That is so where the tokenizer adds none, in conversations, and where each document has one already.
    """
    tokenizer = store.manifest.tokenizer
    if tokenizer.get("adds_bos") is None and tokenizer.get("bos_id") is not None:
        _say_unknown(store)
    if not tokenizer.get("adds_bos") or store.manifest.config.get("chat") or _begins_with_bos(store):
        return None
    return int(tokenizer["bos_id"])


def _say_unknown(store: TokenStore) -> None:
    if store.manifest.config.get("chat") or _begins_with_bos(store):
        return
    log_once(
        "data",
        f"{store.path}: the store does not say whether its tokenizer begins texts with BOS (token "
        f"{store.manifest.tokenizer['bos_id']}), so its documents are read without; older versions did not write it "
        "down. Tokenize again, or pack with specials: bos, if the model was trained with it",
    )


def frame_words(spec: PackConfig) -> str:
    """Say what stands where documents and the rows that go on with one begin: "BOS 2, text; continued: text"."""
    begin = f"BOS {spec.bos_id}, text" if spec.num_bos else "text"
    end = f", EOS {spec.eos_id}" if spec.num_eos else ""
    return f"{begin}{end}; continued: {f'token {spec.mos_id}, ' if spec.num_mos else ''}text"


def _begins_with_bos(store: TokenStore) -> bool:
    return _have_at(store, slice(None, 1), store.manifest.tokenizer.get("bos_id"))


def _ends_with_eos(store: TokenStore) -> bool:
    return _have_at(store, slice(-1, None), store.manifest.tokenizer.get("eos_id"))


def _have_at(store: TokenStore, place: slice, token: int | None) -> bool:
    """Whether the documents of a store that are looked at all have a token at their beginning, or end."""
    if token is None or not len(store):
        return False
    looked_at = np.unique(np.linspace(0, len(store) - 1, LOOKED_AT).astype(np.int64))
    return all(store.tokens(int(document))[place].tolist() == [token] for document in looked_at)
