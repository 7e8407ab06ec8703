"""What one request tells of a server before a run."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import ArgumentError, RunError
from longspan.infer.handshake import shake_hands
from longspan.infer.requests import Request
from tests.api.fake_server import chat, error, serving
from tests.infer.test_remote import answerer_of

IDS = np.arange(20)
USER = {"role": "user", "content": "One, two,"}


def shaken(reply: Any, request: Request, *, measures: bool = False, kind: str = "chat") -> None:
    with serving(lambda asked: reply) as server:
        answerer = answerer_of(server, kind)
        try:
            shake_hands(answerer, request, measures=measures)
        finally:
            answerer.close()


@pytest.mark.parametrize(
    ("messages", "counted", "remark"),
    [
        ([USER], 21, None),
        ([USER], 26, "another template"),
        ([USER, {"role": "assistant", "content": "three,"}], 20, None),
        ([USER, {"role": "assistant", "content": "three,"}], 24, "continue_final_message"),
        (None, 60, None),
    ],
)
def test_counts_give_a_template_away(
    messages: Any, counted: int, remark: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A beginning that the server closes is four tokens more: too few for the remark on long prompts."""
    caplog.set_level(logging.INFO, "longspan")
    shaken(chat("four", usage=(counted, 2)), Request("One, two,", IDS, messages=messages, max_new_tokens=2))
    assert f"{counted} tokens counted" in caplog.text and "answers in" in caplog.text
    warned = [each.message for each in caplog.records if each.levelno == logging.WARNING]
    assert (remark in warned[0]) if remark else not warned


def test_a_server_that_does_not_answer_ends_the_run_before_it_begins() -> None:
    """Every sample was recorded as unscored."""
    with pytest.raises(RunError, match=r"no answer to a first request(.|\n)*nothing has been recorded"):
        shaken(error(400, "no"), Request("One, two,", IDS, messages=[USER]))


def test_a_server_that_measures_nothing_is_refused() -> None:
    with pytest.raises(ArgumentError, match="how likely given tokens are"):
        shaken(chat("four"), Request("One, two,", IDS, messages=[USER]), measures=True)
