"""Where requests go: the address, the protocol spoken there, the model, and the key from the environment.

    Endpoint(model="qwen3-8b", base_url="http://localhost:8000/v1")                 vLLM, transformers serve, ...
    Endpoint(model="gpt", base_url="https://me.openai.azure.com/openai/deployments/gpt", api_version="2024-10-21")
    Endpoint(kind="anthropic", model="claude")                                      the provider's own address

Settings hold the name of the variable in which the key lies, never the key: they are written to run folders.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pydantic

from longspan.api.providers import PROVIDERS, Kind
from longspan.core.config import Config, Length
from longspan.core.errors import ConfigError
from longspan.core.log import log_once

_AZURE_HOSTS = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")


class Key:
    """A key out of the environment; nothing that is printed, logged or written holds it."""

    __slots__ = ("_value", "variable")

    def __init__(self, value: str, variable: str) -> None:
        self._value = value
        self.variable = variable

    def reveal(self) -> str:
        """Return the key, for the header of a request."""
        return self._value

    def scrub(self, text: str) -> str:
        """Return `text` with the key blotted out: servers like to quote what they refuse."""
        return text.replace(self._value, "***") if self._value else text

    def __repr__(self) -> str:
        return f"Key(from {self.variable})" if self._value else "Key(none)"

    def __reduce__(self) -> Any:
        raise TypeError("a key is not pickled")


class Endpoint(Config):
    """An address that answers, and the model behind it."""

    model: str = pydantic.Field(min_length=1)
    """Name of the model as the server knows it (of an Azure deployment: any name you like)."""
    kind: Kind = "chat"
    """chat, completions: OpenAI's protocol, which most servers speak; anthropic: Anthropic's messages."""
    base_url: str = ""
    """Up to and without `/chat/completions`, `/completions` or `/messages`; empty: the provider itself."""
    key_variable: str | None = None
    """Environment variable that holds the key; None: OPENAI_API_KEY, AZURE_OPENAI_API_KEY or ANTHROPIC_API_KEY."""
    api_version: str | None = None
    """Azure's `api-version`, or Anthropic's `anthropic-version` header."""
    timeout: pydantic.PositiveFloat = 600.0
    """Seconds that one attempt may take from the first byte sent to the last one received."""
    max_length: Length | None = pydantic.Field(None, ge=1)
    """Tokens that prompt and answer may have together; longer requests are not sent. None: the server says."""
    extra: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Further fields of every body (`reasoning_effort`, `chat_template_kwargs`, ...); null leaves out one of ours."""

    @pydantic.field_validator("base_url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        # The message never shows the address: what is wrong with it may be that it holds a secret.
        if not url:
            return url
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host, parts = None, urlsplit("")
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError("base_url is not an address", allowed="such as http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                "base_url holds credentials",
                fix="put the key into an environment variable and name that as key_variable",
            )
        if parts.query or parts.fragment:
            raise ConfigError(
                "base_url holds a query",
                allowed="scheme, host and path; Azure's version goes into api_version",
            )
        path = parts.path.rstrip("/")
        for provider in PROVIDERS.values():
            path = path.removesuffix(provider.path)
        return urlunsplit((parts.scheme, parts.netloc, path, "", ""))

    @property
    def address(self) -> str:
        """The base address, without any secret."""
        return self.base_url or PROVIDERS[self.kind].address

    @property
    def is_azure(self) -> bool:
        """Whether this is Azure's dialect: the key in `api-key`, the version in the query."""
        parts = urlsplit(self.address)
        return "/deployments/" in parts.path + "/" or (parts.hostname or "").endswith(_AZURE_HOSTS)

    @property
    def url(self) -> str:
        """Where requests are posted."""
        query = f"?api-version={self.api_version}" if self.is_azure and self.api_version else ""
        return self.address + PROVIDERS[self.kind].path + query

    @property
    def limit_field(self) -> str:
        """Name of the field that limits the answer: newer models of OpenAI refuse the old one."""
        new = self.kind == "chat" and urlsplit(self.address).hostname == "api.openai.com"
        return "max_completion_tokens" if new else "max_tokens"

    def headers(self, key: Key) -> dict[str, str]:
        """Return the headers of a request; they hold the key."""
        headers = {"content-type": "application/json"}
        provider = PROVIDERS[self.kind]
        if provider.version is not None:
            name, usual = provider.version
            headers[name] = self.api_version or usual
        if value := key.reveal():
            name = "api-key" if self.is_azure else provider.key_header
            headers[name] = f"Bearer {value}" if name == "authorization" else value
        return headers

    def read_key(self) -> Key:
        """Return the key from the environment; an empty one for servers that may not want any.

        Raises:
            ConfigError: the variable is not set though it was named or the provider wants a key, or it
                holds what cannot stand in a header.
        """
        variable = self.key_variable or self._usual_variable()
        value = os.environ.get(variable, "").strip()
        if not value and (self.key_variable or not self.base_url or self.is_azure):
            raise ConfigError(f"the environment variable {variable} is not set", fix=f"export {variable}=...")
        if not (value.isascii() and value.isprintable()) or any(character.isspace() for character in value):
            raise ConfigError(
                f"the environment variable {variable} does not hold a key",
                found="characters that cannot stand in a header",
                fix="look for line breaks, quotes or spaces in it",
            )
        host = urlsplit(self.address).hostname or ""
        if value and self.address.startswith("http:") and host not in ("localhost", "127.0.0.1", "::1"):
            log_once("api", f"the key in {variable} travels unencrypted to {host}")
        return Key(value, variable)

    def _usual_variable(self) -> str:
        return "AZURE_OPENAI_API_KEY" if self.is_azure else PROVIDERS[self.kind].key_variable
