"""What to annotate, by which teacher and how much of it to keep."""

from __future__ import annotations

from typing import Any, Literal, Self

import pydantic

from longspan.core.config import Config, Length, TokenBudget
from longspan.core.schedule_table import CpScheduleName

__all__ = ["AnnotateConfig", "PairWindows", "TeacherConfig"]


class TeacherConfig(Config):
    """Which model, and how it runs."""

    model: str
    """The teacher: Hugging Face folder, hub name, or folder of an adapter."""
    rope: dict[str, Any] | None = None
    """RoPE in place of the teacher's own, such as {rope_type: linear, factor: 8}."""
    context: Length | None = pydantic.Field(None, gt=0)
    """Tokens that the teacher may read, such as 128k. None: max_position_embeddings of its config. A RoPE that depends
    on the length is that of so many tokens."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the teacher's weights. None: as saved."""
    quantize: Literal["nf4"] | None = None
    """Keep the teacher's linear layers in 4 bits."""
    cp: int = pydantic.Field(1, ge=1)
    """Processes that share each row (context parallelism); GPUs under torchrun."""
    schedule: CpScheduleName = "ring"
    """Context-parallel schedule: how keys travel among the processes of `cp`."""
    batch_tokens: TokenBudget = pydantic.Field(16_384, gt=0)
    """Tokens in one forward pass, at least one row."""

    @pydantic.model_validator(mode="after")
    def _schedule_has_effect(self) -> Self:
        if self.cp == 1 and self.schedule != "ring":
            raise ValueError(
                f"schedule {self.schedule} has no effect without cp: it says how keys travel among those processes"
            )
        return self


class PairWindows(Config):
    """CEPE's windows; see `sources.PairSource`."""

    encoder_tokens: Length = pydantic.Field(2048, ge=0)
    """cepe: last tokens of prev_token_ids that the teacher reads."""
    decoder_tokens: Length = pydantic.Field(2048, gt=0)
    """cepe: first tokens of token_ids, which are annotated."""
    retrieval: str | None = None
    """cepe: folder like `data` whose retrieved_token_ids are read as the encoder's."""
    retrieval_k: int = pydantic.Field(8, ge=1)
    """cepe: passages of `retrieval`."""
    allow_pickle: bool = False
    """Read pickled columns too, as CEPE's own code writes them: plain arrays alone, and no code is run."""


class AnnotateConfig(Config):
    """Everything that decides what is written."""

    teacher: TeacherConfig
    data: str
    """Pack plan, packed rows or token store (each document by itself); for CEPE's windows the folder of one domain of
    `data pairs`, or of several."""
    k: int = pydantic.Field(50, ge=1)
    """Words kept after each token."""
    mass: float | None = pydantic.Field(None, gt=0, le=1)
    """Keep only as many words as hold this mass, such as 0.99; at most `k`. None: always as many."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the logarithms."""
    pairs: PairWindows | None = None
    """Write CEPE's columns for CEPE's windows."""
    piece_tokens: TokenBudget = pydantic.Field(1 << 18, gt=0)
    """Tokens of a shard file: what a killed job does again."""

    @pydantic.model_validator(mode="after")
    def _pairs_are_dense(self) -> Self:
        if self.pairs is not None and (self.mass is not None or self.dtype != "float16"):
            raise ValueError("CEPE's columns hold k words in float16: mass and dtype have no effect on them")
        return self
