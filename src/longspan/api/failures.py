"""What a failed answer means: ask again, give this request up, or give the whole job up.

408 409 425 429 5xx, timeouts, broken answers     Retry, after what the server asks for
400 413 422                                       this request alone: too long, refused by a filter, rejected
401 402 403 404 405, unknown model, no credit     UserError: no request can succeed
"""

from __future__ import annotations

import email.utils
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from longspan.api.endpoint import Endpoint, Key
from longspan.api.messages import ParsedAnswer
from longspan.api.protocol import MalformedError, parse_json
from longspan.core.errors import ConfigError, UserError

_RETRIED = frozenset({408, 409, 425, 429})
_NOT_IMPLEMENTED = 501
_EXCERPT = 300
_TOO_LONG = re.compile(
    r"context[_ ](length|window|size|limit)|maximum (context|model) length|prompt is too long"
    r"|too many (input )?tokens|exceed[_s]*(ed)?[_ ](the )?(available )?context|`?inputs`? tokens \+"
    r"|input length and|string_above_max_length|request_too_large",
    re.IGNORECASE,
)
_FILTERED = re.compile(r"content[_ ](filter|management|policy)|responsible ?ai|safety system", re.IGNORECASE)
_NO_MODEL = re.compile(
    r"model_not_found|model[^.]{0,100}(does not exist|not found|is not available)|unknown model|invalid model",
    re.IGNORECASE | re.DOTALL,
)
_BAD_KEY = re.compile(
    r"(incorrect|invalid)[ _]api[ _]key|api key not valid|authentication_error", re.IGNORECASE
)
_NO_CREDIT = re.compile(r"insufficient_quota|credit balance is too low|billing_hard_limit", re.IGNORECASE)
_STATUS_OF = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
}
# Providers quote a refused key with its middle blotted out; the rest is still not for logs.
_KEY_LIKE = re.compile(r"\b(sk|pk|gsk)-[\w*-]{6,}")


class Retry(NamedTuple):
    """This attempt failed; another may not."""

    cause: str
    """What is counted: `HTTP 429`, `timeout`, `malformed`, ..."""
    after: float | None = None
    """Seconds that the server wants all of us to wait."""
    detail: str = ""


def judge_failure(
    status: int, headers: Mapping[str, str], body: str, *, endpoint: Endpoint, key: Key, wall: float
) -> Retry | ParsedAnswer:
    """Say what an answer with an error status means; `wall` is the time of day in seconds since 1970.

    Raises:
        UserError: no request can succeed before the user mends something.
    """
    said = excerpt(body, key)
    if status == 402 or _NO_CREDIT.search(said):
        raise UserError(
            f"{endpoint.address} refuses to answer: there is no credit left", found=f"HTTP {status}: {said}"
        )
    if status in _RETRIED or (status >= 500 and status != _NOT_IMPLEMENTED):
        return Retry(f"HTTP {status}", retry_after(headers, wall=wall), said)
    if status in (400, 413, 422):
        return _judge_request(status, said, endpoint, key)
    if status in (401, 403):
        raise _bad_key(status, endpoint, key)
    if status == 404 and _NO_MODEL.search(said):
        raise _no_model(status, said, endpoint)
    raise ConfigError(
        f"{endpoint.address} does not answer as an endpoint of kind {endpoint.kind}",
        found=f"HTTP {status}: {said}",
        fix=f"check base_url, kind and model ({endpoint.model!r})",
    )


def judge_error_in_body(error: Any, *, endpoint: Endpoint, key: Key, wall: float) -> Retry | ParsedAnswer:
    """Say what an error inside a successful answer means: as if it had come with a status. Raises UserError."""
    code, kind = (error.get("code"), error.get("type")) if isinstance(error, Mapping) else (None, None)
    usual = _STATUS_OF.get(str(kind), 500)
    status = code if isinstance(code, int) and 400 <= code < 600 else usual
    return judge_failure(status, {}, json.dumps({"error": error}), endpoint=endpoint, key=key, wall=wall)


def retry_after(headers: Mapping[str, str], *, wall: float) -> float | None:
    """Return the seconds that `Retry-After` (seconds or an HTTP date) or `retry-after-ms` ask for."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", value):
            return float(value) * scale
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return None
    return max(0.0, date.timestamp() - wall)


def excerpt(body: str, key: Key) -> str:
    """Return what the server says about an error, short, on one line and without any key."""
    text = body
    try:
        payload = parse_json(body)
    except MalformedError:
        payload = None
    if isinstance(payload, Mapping):
        error = payload.get("error", payload)
        if isinstance(error, Mapping):
            inner = error.get("innererror")
            # The codes first: messages can be long, and what is cut off is not judged.
            parts = [error.get("code"), error.get("type"), error.get("message"), error.get("detail")]
            parts.insert(0, inner.get("code") if isinstance(inner, Mapping) else None)
            text = "; ".join(str(part) for part in parts if part and not isinstance(part, int)) or body
        else:
            text = str(error)
    text = _KEY_LIKE.sub("***", key.scrub(" ".join(text.split())))
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."


def _judge_request(status: int, said: str, endpoint: Endpoint, key: Key) -> ParsedAnswer:
    if status == 413 or _TOO_LONG.search(said):
        return ParsedAnswer("", error="too long", detail=said)
    if _FILTERED.search(said):
        return ParsedAnswer("", error="refused", detail=said)
    if _BAD_KEY.search(said):
        raise _bad_key(status, endpoint, key)
    if _NO_MODEL.search(said):
        raise _no_model(status, said, endpoint)
    return ParsedAnswer("", error="rejected", detail=f"HTTP {status}: {said}")


def _bad_key(status: int, endpoint: Endpoint, key: Key) -> UserError:
    # What the server says is not repeated: it may hold a part of the key.
    sent = f"the key in {key.variable}" if key.reveal() else f"no key ({key.variable} is not set)"
    return ConfigError(
        f"{endpoint.address} refuses the key",
        found=f"HTTP {status} with {sent}",
        fix=f"set {key.variable} to a key that may use {endpoint.model!r}",
    )


def _no_model(status: int, said: str, endpoint: Endpoint) -> UserError:
    return ConfigError(
        f"{endpoint.address} has no model {endpoint.model!r}",
        found=f"HTTP {status}: {said}",
        fix="give the name under which the server knows it",
    )
