"""Where the tokens of a prompt stand among those that a server echoes with their log-probabilities.

    sent      [5, 9, 2]
    echoed    [5, 9, 2, new]       as they are: shift 0
              [9, 2, new]          without the first, which has no log-probability: -1
              [1, 5, 9, 2, new]    behind a BOS of the server's own: +1

Read at the wrong place, a right answer has the likelihood of its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longspan.api.messages import ChatRequest

TOKEN_ID = "token_id:"
"""What stands before a token's number where a server names tokens by it (vLLM, `return_tokens_as_token_ids`)."""
SHIFTS = (0, -1, 1, -2, 2)


def find_shift(request: ChatRequest, values: Sequence[Any], tokens: Sequence[Any] | None) -> int | None:
    """Return by how many places the echoed tokens of a prompt of ids are shifted; None: they are others.

    By their numbers where the server gives them, else by their texts, else by how many there are.

    Args:
        values: log-probabilities as they came; the first token of all has none.
        tokens: the names of the same tokens; None: the server does not say.
    """
    prompt = request.prompt if isinstance(request.prompt, Sequence) else ()
    if not tokens or len(tokens) != len(values):
        return _by_count(len(prompt), values)
    if all(str(token).startswith(TOKEN_ID) for token in tokens):
        wanted = [f"{TOKEN_ID}{token}" for token in prompt]
        return next((shift for shift in SHIFTS if _stands(wanted, tokens, len(prompt), shift)), None)
    texts = request.token_texts
    if not texts:
        return _by_count(len(prompt), values)
    named = [_plain(str(token)) for token in tokens]
    found = {shift: _share([_plain(text) for text in texts], named, len(prompt), shift) for shift in SHIFTS}
    best = max(SHIFTS, key=lambda shift: found[shift])  # of equal ones the first: as they are
    return best if found[best] > 0.5 else None


def _by_count(sent: int, values: Sequence[Any]) -> int | None:
    """Return the shift by numbers alone; one new token may stand behind the prompt."""
    more = len(values) - sent
    if values[0] is not None:
        # Something stands before this token, or the server makes a number up for the first one.
        return {-1: -1, 1: 0}.get(more)
    return 0 if more in (0, 1) else more - 1 if more <= max(SHIFTS) + 1 else None


def _stands(wanted: Sequence[str], tokens: Sequence[Any], sent: int, shift: int) -> bool:
    first = max(0, -shift)
    return sent + shift <= len(tokens) and list(tokens[first + shift : sent + shift]) == wanted[first:]


def _share(texts: Sequence[str], named: Sequence[str], sent: int, shift: int) -> float:
    """Return the share of the prompt's last tokens that stand where they would with this shift."""
    start = sent - len(texts) + shift
    if sent + shift > len(named):
        return 0.0
    pairs = [(text, named[start + place]) for place, text in enumerate(texts) if start + place >= 0]
    # A part of a character has no text of its own, and each server its own way to write that.
    known = [(text, name) for text, name in pairs if "\ufffd" not in text]
    return sum(text == name for text, name in known) / len(known) if known else float(shift == 0)


def _plain(token: str) -> str:
    """Return a token's text without what vocabularies write for spaces and line ends."""
    return token.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\n").strip(" ")
