"""The providers of models behind a server: where each is, how it wants its key, and which protocol it speaks.

A new one is a protocol (`api.protocol.WireProtocol`), its kind and its entry here; evaluation, synth and judges know it
by the prefix of a model name, `openai:NAME`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["KINDS", "MODEL_NAMES", "PROVIDERS", "Kind", "Provider"]

Kind = Literal["chat", "completions", "anthropic"]


class Provider(NamedTuple):
    """One kind of endpoint."""

    prefix: str
    """Part of a model's name before the colon."""
    protocol: str
    """Module of `api` and class: "openai_protocol:ChatProtocol"."""
    address: str
    """Of the provider itself."""
    path: str
    """Behind the address, where requests are posted."""
    key_variable: str
    """Environment variable that usually holds the key."""
    key_header: str = "authorization"
    """Header of the key; in `authorization` it stands behind `Bearer`."""
    version: tuple[str, str] | None = None
    """Header of the protocol's version, and the version that is spoken."""
    lists_models: bool = True
    """Whether `/models` says what is behind a name."""


_OPENAI, _OPENAI_KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"
PROVIDERS: dict[Kind, Provider] = {
    "chat": Provider("openai", "openai_protocol:ChatProtocol", _OPENAI, "/chat/completions", _OPENAI_KEY),
    "completions": Provider(
        "completions", "openai_protocol:CompletionsProtocol", _OPENAI, "/completions", _OPENAI_KEY
    ),
    "anthropic": Provider(
        "anthropic",
        "anthropic_protocol:AnthropicProtocol",
        "https://api.anthropic.com/v1",
        "/messages",
        "ANTHROPIC_API_KEY",
        key_header="x-api-key",
        version=("anthropic-version", "2023-06-01"),
        lists_models=False,
    ),
}
KINDS: dict[str, Kind] = {provider.prefix: kind for kind, provider in PROVIDERS.items()}
"""The kind of endpoint by the prefix of a model's name."""
MODEL_NAMES: tuple[str, ...] = tuple(f"{prefix}:NAME" for prefix in KINDS)
"""How models behind a server are named."""
