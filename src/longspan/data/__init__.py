"""From raw text to training rows: readers, tokenizer, token store, length table, mixture, packing, loader.

Names are imported when first used, so that `import longspan.data` costs nothing.
"""

import importlib
from typing import Any

_HOMES = {
    "Document": "readers",
    "LengthTable": "store.lengths",
    "MDSDirectory": "store",
    "MixtureConfig": "plans.mixture_config",
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
