"""How a model behind a server is asked: the same settings wherever one is, `--server FILE` or YAML on command lines."""

from __future__ import annotations

from typing import Any, NamedTuple

import pydantic

from longspan.api.budget import SpendingLimits
from longspan.api.client import Client
from longspan.api.endpoint import Endpoint
from longspan.api.limits import Limits
from longspan.api.providers import KINDS
from longspan.core.config import Config, Length
from longspan.core.errors import ArgumentError


class ServerConfig(Config):
    """How a model behind a server is asked; an address alone, `http://localhost:8000/v1`, is read as `base_url`."""

    base_url: str = ""
    """Address, such as http://localhost:8000/v1; empty: the provider itself."""
    key_variable: str | None = None
    """Environment variable that holds the key. None: the provider's own."""
    api_version: str | None = None
    """Of Azure or Anthropic."""
    max_length: Length | None = pydantic.Field(None, ge=1)
    """Tokens that prompt and answer may have together; longer requests are not sent. None: the server says."""
    trained_length: Length | None = pydantic.Field(None, ge=1)
    """Tokens that the model was trained for, which its server does not say."""
    extra: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Further fields of each request; a null leaves one out, `{temperature: null}` for reasoning models say."""
    continue_final_message: bool = False
    """Whether a chat may end in the beginning of the assistant's answer, which the server goes on with: vLLM and
    SGLang do; others begin another turn."""
    cache: str | None = None
    """SQLite file of answers; what stands there is not asked again."""
    limits: Limits = Limits()
    """Rate limits: requests at once, requests and tokens a minute."""
    budget: SpendingLimits = SpendingLimits()
    """Where a job stops."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _address(cls, values: Any) -> Any:
        return {"base_url": values} if isinstance(values, str) else values


class RemoteModel(NamedTuple):
    """`openai:NAME` and the like, taken apart."""

    provider: str
    name: str

    def endpoint(self, server: ServerConfig) -> Endpoint:
        """Return where requests go. Raises ConfigError: the address is none."""
        values = {"kind": KINDS[self.provider], "model": self.name}
        shared = ("base_url", "key_variable", "api_version", "max_length", "extra")
        values |= {name: getattr(server, name) for name in shared}
        return Endpoint.from_dict(values, where="the server")

    def client(self, server: ServerConfig) -> Client:
        """Return a client; close it. Raises ConfigError: there is no key; MissingDependencyError."""
        budget = server.budget.priced(self.name)
        return Client(self.endpoint(server), limits=server.limits, cache=server.cache, budget=budget)


def remote_model(model: str) -> RemoteModel | None:
    """Return provider and name of `openai:NAME` and the like; None for a model to be run here."""
    provider, colon, name = model.partition(":")
    return RemoteModel(provider, name) if colon and provider in KINDS else None


def chat_model(model: str | None, *, option: str, fix: str | None = None) -> RemoteModel:
    """Return a model that answers in a chat. Raises ArgumentError naming the option that names it."""
    found = remote_model(model or "")
    if found is None or not found.name or found.provider == "completions":
        raise ArgumentError(
            "which model is asked is not said" if model is None else "there is no such provider",
            found=None if model is None else repr(model),
            allowed=f"{option} openai:NAME (with --base-url for servers of your own) or anthropic:NAME",
            fix=fix,
        )
    return found
