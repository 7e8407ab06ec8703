"""Settings of a model that is asked: which one, what is changed about it, and how it runs."""

from __future__ import annotations

from typing import Any, Literal, Self

import pydantic

from longspan.api import ServerConfig, remote_model
from longspan.api.providers import MODEL_NAMES
from longspan.core.config import Config, Length, TokenBudget, changed_fields
from longspan.core.schedule_table import CpScheduleName

RUN_HERE = (
    "rope", "rope_theta", "dtype", "tp", "cp", "replicas", "schedule", "batch_tokens", "prefix_reuse"
)  # fmt: skip
"""Settings of a model that is run here."""
_NOT_SERVED = ("cp", "replicas", "schedule", "batch_tokens", "prefix_reuse")


class AnswererConfig(Config):
    """The model that is asked, and how it runs."""

    model: str
    """Hugging Face folder or hub name, a folder of our training (run, stage, checkpoint, adapter), or openai:NAME,
    completions:NAME, anthropic:NAME for a model behind a server."""
    tokenizer: str | None = None
    """Tokenizer. None: the one in the model's folder, or of an adapter's base."""
    label: str | None = None
    """Name of the model in reports. None: that of its folder."""
    rope: dict[str, Any] | None = None
    """RoPE to use instead of the model's own, such as {rope_type: linear, factor: 8}."""
    rope_theta: float | None = None
    """Base of the RoPE instead of the model's own, such as 5e6."""
    max_length: Length | None = None
    """Tokens of prompt and answer at most, such as 128k. None: no limit."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights. None: as saved; on a GPU bfloat16."""
    chat_template: str | None = None
    """Ask as in a chat: own, the tokenizer's template, or a shipped name or a Jinja file. None: as plain text."""
    tp: pydantic.PositiveInt = 1
    """Tensor parallelism: processes that share each matrix."""
    cp: pydantic.PositiveInt = 1
    """Context parallelism: processes that share each sequence."""
    replicas: pydantic.PositiveInt | None = None
    """Copies of the model, each on a process (or on `cp`), that share out the samples. None: as many as torchrun or
    srun has started processes for, else 1."""
    schedule: CpScheduleName | None = None
    """Context-parallel schedule: how keys travel among the processes of `cp` where prompts do not begin alike. None:
    ring."""
    batch_tokens: TokenBudget = pydantic.Field(16384, gt=0)
    """Tokens in one forward pass, at least one sample."""
    prefix_reuse: bool = True
    """Read what several prompts begin with once. Off: every prompt from its first token."""
    serve: Literal["vllm", "sglang", "llama.cpp", "transformers"] | None = None
    """Start this server for the model, ask it, and stop it in the end. None: the model is run here, or its name says
    the server."""
    serve_flags: str | None = None
    """Further flags of that server, as on its command line, such as '--gpu-memory-utilization 0.8 --enforce-eager'.
    Records name them. None: those that longspan gives."""
    kv_dtype: Literal["int8", "fp8", "q8_0", "q4_0"] | None = None
    """Type of the KV cache: int8, fp8 (a model that is run here), fp8 (vllm, sglang), q8_0, q4_0 (llama.cpp). It is
    part of the label. None: as keys are computed, or the server's own."""
    server: ServerConfig | None = None
    """How the server is asked, as YAML, a YAML file or its address: base_url, trained_length, limits (concurrency,
    tokens_per_minute ...), budget, cache, extra, continue_final_message, key_variable, api_version."""

    @pydantic.model_validator(mode="after")
    def _all_have_effect(self) -> Self:
        if self.is_remote:
            if changed := changed_fields(self, (*RUN_HERE, "serve", "serve_flags", "kv_dtype")):
                raise ValueError(
                    f"how a model runs behind a server is decided there: leave out {', '.join(changed)}"
                )
            if self.server is not None and self.server.continue_final_message and not self.is_chat_server:
                raise ValueError(
                    "continue_final_message has an effect in chats alone: completions go on with the text anyway"
                )
            return self
        if self.serve is not None:
            if changed := changed_fields(self, _NOT_SERVED):
                raise ValueError(
                    f"a server that is started decides that itself: leave out {', '.join(changed)}"
                )
            if self.server is not None and self.server.base_url:
                raise ValueError(f"serve {self.serve} starts a server of its own: leave out its address")
            return self
        if self.serve_flags is not None:
            raise ValueError("serve_flags are of a server that is started here: name it with serve")
        if self.kv_dtype in ("q8_0", "q4_0"):
            raise ValueError(
                f"kv_dtype {self.kv_dtype} is of llama.cpp's cache: serve it, or take int8 or fp8"
            )
        if self.kv_dtype is not None and (self.cp > 1 or not self.prefix_reuse):
            raise ValueError(
                "kv_dtype is of the cache that prefixes are kept in: it takes no cp and no prefix_reuse: false"
            )
        if self.server is not None:
            raise ValueError(
                f"server and its address are for models behind a server ({', '.join(MODEL_NAMES)}); "
                f"{self.model!r} is run here"
            )
        if self.schedule is not None and self.cp == 1:
            raise ValueError(
                "schedule has no effect without cp: it says how keys travel among those processes"
            )
        if self.tp > 1 and self.cp > 1:
            raise ValueError(f"processes share either matrices or sequences: tp {self.tp}, cp {self.cp}")
        if self.tp > 1 and (self.replicas or 1) > 1:
            raise ValueError(
                f"matrices are shared by all processes (tp {self.tp}, replicas {self.replicas}): let each replica run "
                "on one process, or on several with cp"
            )
        return self

    @property
    def is_remote(self) -> bool:
        """Whether the model is behind a server."""
        return remote_model(self.model) is not None

    @property
    def is_chat_server(self) -> bool:
        """Whether that server puts every prompt into a chat."""
        return self.is_remote and not self.model.startswith("completions:")
