"""One training step as it is estimated, with the settings that save memory, which are the recipe's."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

import pydantic

from longspan.core.config import Config, TokenBudget
from longspan.core.mesh_config import MeshConfig

__all__ = ["LINEARS", "Adapters", "MemoryConfig", "TrainingStep"]

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear layers of a block."""


class MemoryConfig(Config):
    """What is spent to use less memory; `memory: auto` in a recipe is short for `memory: {auto: true}`."""

    auto: bool = False
    """Choose the cheapest of the settings below with which every stage fits this machine, and say why. The types stay
    as they are given: they change what is computed."""
    activation_checkpointing: Literal["none", "full", "offload"] = "none"
    """Activation (gradient) checkpointing: recompute each block in the backward pass from its input; `offload` keeps
    the inputs in host memory."""
    tiled_mlp: TokenBudget | None = pydantic.Field(None, gt=0)
    """Tokens that an MLP, or the experts of a mixture, compute at a time. None: all at once."""
    offload_parameters: bool = False
    """CPU offloading: keep parameters, gradients and optimizer state in host memory."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Mixed precision: type of the forward and backward pass beside master weights of `model.dtype`. None:
    `model.dtype`, but bfloat16 on a GPU where all weights are trained; set float32 to compute in that there."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed over processes."""

    chunk_tokens: TokenBudget | None = pydantic.Field(None, gt=0)
    """Walk each micro-batch in chunks of so many tokens, with the same gradients (train/recurrent.py): memory of a
    chunk and of the keys and values. Not beside cp_ring or cp_ulysses. None: all at once."""
    offload_chunk_cache: bool = False
    """Keep those keys, values and their gradients in host memory."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"auto": True} if value == "auto" else value

    @pydantic.model_validator(mode="after")
    def _nothing_chosen_twice(self) -> Self:
        chosen = self.model_fields_set & self.chosen.keys()
        if self.auto and chosen:
            raise ValueError(
                f"memory.auto chooses {', '.join(sorted(chosen))}: leave it out, or leave auto out"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _there_is_a_cache(self) -> Self:
        if self.offload_chunk_cache and self.chunk_tokens is None:
            raise ValueError("offload_chunk_cache has no effect without chunk_tokens")
        return self

    @property
    def needs_sharding(self) -> bool:
        """Whether a single process too has to run through FSDP."""
        return self.offload_parameters or self.compute_dtype is not None

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings that `auto` chooses: all but the types."""
        return {
            "activation_checkpointing": self.activation_checkpointing,
            "tiled_mlp": self.tiled_mlp,
            "offload_parameters": self.offload_parameters,
            "chunk_tokens": self.chunk_tokens,
            "offload_chunk_cache": self.offload_chunk_cache,
        }


class Adapters(NamedTuple):
    """Adapters in the blocks; the weights themselves are frozen."""

    rank: int
    targets: tuple[str, ...] = LINEARS
    """Linear layers that have one."""
    quantized: bool = False
    """Frozen linear layers are stored in 4 bits (QLoRA)."""
    embeddings: bool = False
    """The embedding is trained whole, in fp32, beside its frozen original."""


class TrainingStep(NamedTuple):
    """One training step; names as in a recipe."""

    tokens: int
    """Tokens of a micro-batch, over all ranks that share the sequence."""
    parallel: MeshConfig = MeshConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """`model.dtype`: of weights and optimizer state."""
    memory: MemoryConfig = MemoryConfig()
    optimizer: Literal["adamw", "muon"] = "adamw"
    lora: Adapters | None = None
    accumulates: bool = False
    """More than one micro-batch in a step."""
    documents: int = 1
    """Of a micro-batch; packed rows hold more than one each."""
    fused: bool = False
    """Norms, the rotation and the MLP's product are one kernel each, as in compiled blocks."""
    cuda: bool = True
    """False: as on a CPU, where attention and loss compute in fp32 and AdamW goes parameter by parameter."""

    @property
    def is_sharded(self) -> bool:
        """Whether the model runs under FSDP."""
        return self.parallel.shards * self.parallel.dp_replicate > 1 or self.memory.needs_sharding

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a weight."""
        return element_bytes(self.dtype)

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return element_bytes(self.memory.compute_dtype or self.dtype)


def element_bytes(dtype: str) -> int:
    """Return the bytes of an element."""
    return {"float32": 4, "bfloat16": 2}[dtype]
