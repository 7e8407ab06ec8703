"""longspan: take a language model from a short context window to a long one.

The whole way is six functions, which the commands call too: `tokenize_corpus`, `mix_stores`, `pack_rows`,
`train_model`, `evaluate_model`, `write_report`. The other names are the pieces to build with. Each is imported from its
room when it is first used, so `import longspan` costs nothing and needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.core.errors import (
        ArgumentError,
        ConfigError,
        DataError,
        LongspanError,
        MissingDependencyError,
        RunError,
        UserError,
    )
    from longspan.data.plans.mixture import plan_mixture
    from longspan.data.plans.mixture_config import MixtureConfig
    from longspan.data.plans.pack_config import PackConfig
    from longspan.data.plans.packing import plan_packing
    from longspan.data.readers import read_documents
    from longspan.data.rows.loader import RowLoader, StreamMixer
    from longspan.data.store import TokenStore
    from longspan.data.store.lengths import LengthTable
    from longspan.data.tokenize import TokenizeConfig, tokenize_corpus
    from longspan.data.tokenizer import load_tokenizer
    from longspan.infer.config import AnswererConfig
    from longspan.models.documents import Documents
    from longspan.models.hf import enable, load_model
    from longspan.models.sharding import shard_batch
    from longspan.parallel.launch import process_group
    from longspan.parallel.mesh import MeshConfig, build_mesh
    from longspan.report import summarise, write_report
    from longspan.steps.evaluate import evaluate_model
    from longspan.steps.mix import mix_stores
    from longspan.steps.pack import pack_rows
    from longspan.steps.train import train_model
    from longspan.train.config import TrainConfig

__version__ = "0.1.0"

# `longspan.train` and `longspan.report` are rooms, so every step is called by what it does and to what.
__all__ = [
    "AnswererConfig",
    "ArgumentError",
    "ConfigError",
    "DataError",
    "Documents",
    "LengthTable",
    "LongspanError",
    "MeshConfig",
    "MissingDependencyError",
    "MixtureConfig",
    "PackConfig",
    "RowLoader",
    "RunError",
    "StreamMixer",
    "TokenStore",
    "TokenizeConfig",
    "TrainConfig",
    "UserError",
    "build_mesh",
    "enable",
    "evaluate_model",
    "load_model",
    "load_tokenizer",
    "mix_stores",
    "pack_rows",
    "plan_mixture",
    "plan_packing",
    "process_group",
    "read_documents",
    "shard_batch",
    "summarise",
    "tokenize_corpus",
    "train_model",
    "write_report",
]

_HOMES = {
    "longspan.core.errors": (
        "ArgumentError",
        "ConfigError",
        "DataError",
        "LongspanError",
        "MissingDependencyError",
        "RunError",
        "UserError",
    ),
    "longspan.data.store.lengths": ("LengthTable",),
    "longspan.data.rows.loader": ("RowLoader", "StreamMixer"),
    "longspan.data.plans.mixture": ("plan_mixture",),
    "longspan.data.plans.mixture_config": ("MixtureConfig",),
    "longspan.data.plans.pack_config": ("PackConfig",),
    "longspan.data.plans.packing": ("plan_packing",),
    "longspan.data.readers": ("read_documents",),
    "longspan.data.store": ("TokenStore",),
    "longspan.data.tokenize": ("TokenizeConfig", "tokenize_corpus"),
    "longspan.data.tokenizer": ("load_tokenizer",),
    "longspan.infer.config": ("AnswererConfig",),
    "longspan.models.documents": ("Documents",),
    "longspan.models.hf": ("enable", "load_model"),
    "longspan.models.sharding": ("shard_batch",),
    "longspan.parallel.launch": ("process_group",),
    "longspan.parallel.mesh": ("MeshConfig", "build_mesh"),
    "longspan.report": ("summarise", "write_report"),
    "longspan.steps.evaluate": ("evaluate_model",),
    "longspan.steps.mix": ("mix_stores",),
    "longspan.steps.pack": ("pack_rows",),
    "longspan.steps.train": ("train_model",),
    "longspan.train.config": ("TrainConfig",),
}


_RENAMED = {"MixtureSpec": "MixtureConfig", "PackSpec": "PackConfig"}
"""Old names, kept for one release."""


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(
            f"longspan.{name} is called longspan.{_RENAMED[name]} now", DeprecationWarning, stacklevel=2
        )
        name = _RENAMED[name]
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'longspan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
