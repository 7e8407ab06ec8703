"""Token stores: the MDS codec, MDS directories, and the store of documents as token ids."""

from longspan.data.store.directory import MDSDirectory, MDSWriter
from longspan.data.store.mds import Column
from longspan.data.store.token_store import (
    SHARD_BYTES,
    Manifest,
    TokenStore,
    TokenStoreWriter,
    open_stores,
    read_manifest,
    token_dtype,
)

__all__ = [
    "SHARD_BYTES",
    "Column",
    "MDSDirectory",
    "MDSWriter",
    "Manifest",
    "TokenStore",
    "TokenStoreWriter",
    "open_stores",
    "read_manifest",
    "token_dtype",
]
