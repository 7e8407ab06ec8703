"""Ask language models over HTTP: OpenAI-compatible and Anthropic endpoints, within limits, never twice the same.

`Client.complete` takes an iterator of requests and gives an iterator of results. Keys come from the environment
and go nowhere but into the header of a request. Needs the extra `api` (httpx) when a client is made.
"""

from longspan.api.budget import CostEstimate, Price, SpendingLimits, estimate, price_of, read_prices
from longspan.api.client import Client
from longspan.api.client_report import ClientReport
from longspan.api.endpoint import Endpoint
from longspan.api.limits import Limits
from longspan.api.messages import ChatRequest, ChatResult, Usage
from longspan.api.server import RemoteModel, ServerConfig, chat_model, remote_model

__all__ = [
    "ChatRequest",
    "ChatResult",
    "Client",
    "ClientReport",
    "CostEstimate",
    "Endpoint",
    "Limits",
    "Price",
    "RemoteModel",
    "ServerConfig",
    "SpendingLimits",
    "Usage",
    "chat_model",
    "estimate",
    "price_of",
    "read_prices",
    "remote_model",
]
