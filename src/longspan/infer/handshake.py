"""One request before a run, so that a server which is not what it was taken for is found out before the work begins."""

from __future__ import annotations

import numpy as np

from longspan.core.errors import ArgumentError, RunError
from longspan.core.log import get_logger
from longspan.data.tokenizer import Tokenizer
from longspan.infer.remote import RemoteAnswerer
from longspan.infer.requests import Answer, Request

GREETING, BEGUN = "One, two, three, four, five, six, seven,", "eight,"
"""What is asked, and how an answer may begin."""
ANSWER_TOKENS = 16
"""Some servers refuse to write fewer."""
_log = get_logger("infer")


def shake_hands(answerer: RemoteAnswerer, request: Request, *, measures: bool) -> None:
    """Ask a server that a user has started, and look at what comes back; what does not hold is a warning.

    Looked at are the time of the answer, the tokens that the server counts, whether it goes on with an answer that is
    begun, and, where given answers are to be measured, its log-probabilities.

    Raises:
        RunError: there is no answer, or none that can be measured where it is to be.
        ArgumentError: this endpoint does not say how likely given tokens are.
    """
    name, limit = answerer.client.endpoint.model, answerer.client.endpoint.timeout
    answer = first_answer(answerer, request, name=name)
    if measures:
        measured = _measured(answerer, request)
        if measured.error is not None:
            raise RunError(
                f"{name} cannot measure given answers",
                found=measured.error,
                fix="let the model generate its answers instead",
            )
    told = "given answers can be measured" if measures else f"{answer.prompt_tokens} tokens counted"
    _log.info("%s answers in %.2f s, of %g that a request may take; %s", name, answer.seconds, limit, told)
    if (remark := _of_counts(answerer, request, answer)) is not None:
        _log.warning("%s: %s", name, remark)


def shake_own_hands(answerer: RemoteAnswerer, tokenizer: Tokenizer, *, name: str) -> None:
    """Do the same with a server that was started for this run: it has to count tokens as the tokenizer here does.

    Raises:
        RunError: there is no answer, or the server counts other tokens.
    """
    ids = tokenizer.encode(GREETING).astype(np.int64)
    request = Request(prompt=GREETING, prompt_ids=ids, max_new_tokens=1)
    answer = first_answer(answerer, request, name=name)
    ours = len(ids)
    counted = answer.prompt_tokens or ours
    # A server that is sent text may begin it with a BOS.
    if not ours <= counted <= ours + (not answerer.sends_ids):
        raise RunError(
            f"{name} counts other tokens than the tokenizer here",
            found=f"{counted} in a prompt of {ours}",
            fix="name the server's tokenizer with --tokenizer",
        )
    try:
        told = _measured(answerer, request).error or "given answers can be measured"
    except ArgumentError as error:
        told = str(error).split("\n")[0]
    _log.info("%s answers in %.2f s; %s", name, answer.seconds, told)


def first_answer(answerer: RemoteAnswerer, request: Request, *, name: str) -> Answer:
    """Return the answer to a first request. Raises RunError: there is none."""
    [(_, answer)] = answerer.generate([request])
    if answer.error is not None:
        raise RunError(
            f"{name} gave no answer to a first request",
            found=answer.error,
            fix="look at the server's log, and at the settings of --server: nothing has been recorded",
        )
    return answer


def _measured(answerer: RemoteAnswerer, request: Request) -> Answer:
    """Let the last two tokens of a prompt be measured."""
    assert request.prompt_ids is not None
    ids = request.prompt_ids
    [(_, measured)] = answerer.score([request._replace(prompt_ids=ids[:-2], answer_ids=ids[-2:])])
    return measured


def _of_counts(answerer: RemoteAnswerer, request: Request, answer: Answer) -> str | None:
    """Return what the server's count of tokens gives away; None: it is ours, but for one that begins a text."""
    if request.prompt_ids is None or not answer.prompt_tokens:
        return None
    ours, theirs = len(request.prompt_ids), answer.prompt_tokens
    messages, completes = request.messages, answerer.client.endpoint.kind == "completions"
    if abs(theirs - ours) <= 1 or (messages is None and not completes):
        # The tokens of a template that is not known here are no news.
        return None
    counts = f"it counts {theirs} tokens in a first prompt that has {ours} by --tokenizer"
    if messages and messages[-1]["role"] == "assistant":
        return (
            f"{counts} and ends in the beginning of an answer. It may close that and begin another "
            "(continue_final_message without effect), so that answers do not begin as they were to"
        )
    return f"{counts}: that is another tokenizer, or the server writes another template around a prompt"
