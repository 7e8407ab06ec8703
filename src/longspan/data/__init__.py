"""From raw text to training rows: readers, tokenizer, token store, length table, mixture, packing, loader.

Names are imported when first used, so that `import longspan.data` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.data.plans.mixture import MixtureConfig, plan_mixture
    from longspan.data.plans.pack_config import PackConfig
    from longspan.data.plans.packing import plan_packing
    from longspan.data.readers import Document, ReadReport, read_documents
    from longspan.data.rows.loader import RowLoader, StreamMixer
    from longspan.data.store import MDSDirectory, TokenStore, TokenStoreWriter
    from longspan.data.store.lengths import LengthTable
    from longspan.data.tokenize import tokenize_corpus
    from longspan.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

_HOMES = {
    "Document": "readers",
    "LengthTable": "store.lengths",
    "MDSDirectory": "store",
    "MixtureConfig": "plans.mixture",
    "PackConfig": "plans.pack_config",
    "ReadReport": "readers",
    "RowLoader": "rows.loader",
    "StreamMixer": "rows.loader",
    "TokenStore": "store",
    "TokenStoreWriter": "store",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "plan_mixture": "plans.mixture",
    "plan_packing": "plans.packing",
    "read_documents": "readers",
    "tokenize_corpus": "tokenize",
    "train_bpe": "tokenizer",
}

__all__ = [
    "Document",
    "LengthTable",
    "MDSDirectory",
    "MixtureConfig",
    "PackConfig",
    "ReadReport",
    "RowLoader",
    "StreamMixer",
    "TokenStore",
    "TokenStoreWriter",
    "Tokenizer",
    "load_tokenizer",
    "plan_mixture",
    "plan_packing",
    "read_documents",
    "tokenize_corpus",
    "train_bpe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
