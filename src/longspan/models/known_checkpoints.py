"""Published checkpoints whose config.json does not say the RoPE that their weights work with.

Each fact holds for a config that says what the published one says; one that was mended is left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from longspan.core.log import log_once
from longspan.models.hf_config import changed_config, rope_of_full, text_config

__all__ = ["KNOWN_CHECKPOINTS", "KnownCheckpoint", "find_known", "with_known_rope"]


class KnownCheckpoint(NamedTuple):
    """What is known of a checkpoint."""

    name: str
    """On the hub; a folder with the last part of it is taken for a copy."""
    saved: Mapping[str, Any]
    """What the RoPE of its config says, or that of its base if it is an adapter."""
    rope: Mapping[str, Any]
    """What its weights work with."""
    context: int | None
    """Positions that they were trained for, where the config says fewer."""
    source: str


_FU = "reset_rope in eval/ of github.com/FranxYao/Long-Context-Data-Engineering"
_LONGCHAT = "longchat/train/fine_tune/train_condense_16K.py of github.com/DachengLi1/LongChat"

KNOWN_CHECKPOINTS = (
    KnownCheckpoint(
        "yaofu/llama-2-7b-80k", {"rope_type": "dynamic"}, {"rope_type": "linear", "factor": 10.0}, 81920, _FU
    ),
    KnownCheckpoint(
        "yaofu/llama-2-13b-64k", {"rope_type": "dynamic"}, {"rope_type": "linear", "factor": 10.0}, 65536, _FU
    ),
    KnownCheckpoint(
        "namespace-Pt/Llama-3-8B-Instruct-80K-QLoRA",
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "default", "rope_theta": 2e8},
        81920,
        "--rope_theta 200e6 in research/Long_LLM/longllm_qlora of github.com/FlagOpen/FlagEmbedding",
    ),
    KnownCheckpoint(
        "lmsys/longchat-7b-16k", {"rope_type": "default"}, {"rope_type": "linear", "factor": 8.0}, 16384, _LONGCHAT
    ),
    KnownCheckpoint(
        "lmsys/longchat-13b-16k", {"rope_type": "default"}, {"rope_type": "linear", "factor": 8.0}, 16384, _LONGCHAT
    ),
)  # fmt: skip


def find_known(path: str | Path, config: PretrainedConfig) -> KnownCheckpoint | None:
    """Return what is known of the checkpoint at a path whose config says less; None: nothing, or it says it."""
    parameters = getattr(text_config(config), "rope_parameters", None)
    if not parameters:
        return None
    own = rope_of_full(parameters)
    for known in KNOWN_CHECKPOINTS:
        if _is_called(path, known.name) and all(own.get(key) == value for key, value in known.saved.items()):
            return known
    return None


def with_known_rope(config: PretrainedConfig, path: str | Path) -> PretrainedConfig:
    """Return the config of the model at a path with the RoPE that its weights are known to need, said in the log."""
    known = find_known(path, config)
    if known is None:
        return config
    said = json.dumps(rope_of_full(text_config(config).rope_parameters), default=str)
    log_once(
        "models",
        f"{path}: its config.json says the RoPE {said}, its weights work with {json.dumps(known.rope)}, which is used "
        f"({known.source}); --rope or the recipe's `rope` outranks it",
    )
    return changed_config(config, rope=known.rope, context=known.context)


def _is_called(path: str | Path, name: str) -> bool:
    """Whether a path is a hub name, a folder that is called as its last part, or its place in the hub's cache."""
    parts = Path(path).parts
    cached = "models--" + name.replace("/", "--")
    return (
        str(path) == name
        or cached in parts
        or (Path(path).is_dir() and Path(path).resolve().name == name.split("/")[1])
    )
