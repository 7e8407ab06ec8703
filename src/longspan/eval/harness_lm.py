"""lm-eval's requests, answered by any of our backends: this process, several ranks, a server.

    lm = HarnessLM(answerer, PromptForm(tokenizer))
    lm_eval.evaluate(lm, TaskManager().load(["mmlu"]))        # or eval.harness.run_harness, which resumes

Contexts and continuations are tokenised together and cut apart where the context ends, as lm-eval's own
models do, so likelihoods equal theirs. All requests of a call are handed over as one list: a prefix that they
share, such as the few-shot examples of a subject, is read once.

Needs the extra `harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from longspan.core.errors import ArgumentError, RunError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.prompts import PromptForm
from longspan.eval.truncation import cut_middle
from longspan.infer.requests import Answer, Answerer, Request

MAX_GEN_TOKENS = 256
"""Where a task does not say how long an answer may be; lm-eval's own default."""
_MAX_FITS = 4


class ChatText(str):
    """The text of a chat with one message of the user, which knows that message."""

    message: str = ""


class Asked(NamedTuple):
    """One lm-eval request as requests of ours (several windows of a rolling likelihood)."""

    requests: list[Request]
    truncated: int
    """Tokens that were taken out of the middle of the context."""


class HarnessLM(LM):
    """An lm-eval model around an `Answerer`.

    Args:
        form: how text becomes ids; its chat template is what lm-eval's `apply_chat_template` applies.
        max_length: tokens of context and answer at most; a longer context loses its middle. None: what the
            answerer says, else the length that the model was trained for, else no limit.
    """

    def __init__(self, answerer: Answerer, form: PromptForm, *, max_length: int | None = None) -> None:
        super().__init__()
        self._answerer, self._form = answerer, form
        self._plain = form.plain()
        trained = answerer.identity.get("trained_length")
        self.max_length = max_length or answerer.max_length or (int(trained) if trained else None)

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of the tokenizer."""
        return self._form.tokenizer.fingerprint

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt's text.

        Raises:
            ArgumentError: the chat is not one message of the user.
        """
        if [message["role"] for message in chat_history] != ["user"] or not add_generation_prompt:
            raise ArgumentError(
                "a chat of an lm-eval task is one message of the user here",
                found=", ".join(message["role"] for message in chat_history),
                fix="leave out the system prompt, the answer's prefix and few-shot examples as turns",
            )
        message = chat_history[0]["content"]
        text = ChatText(self._form.request(message, max_new_tokens=1).prompt)
        text.message = message
        return text

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether greedy decoding would give it."""
        return self._all("score", [self.ask_likelihood(*each.args) for each in requests], likelihood)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Return the log-likelihood of each text, read in windows of the longest length."""
        return self._all(
            "score",
            [self.ask_rolling(each.args[0]) for each in requests],
            lambda asked, answers: likelihood(asked, answers)[0],
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return what greedy decoding gives up to a stop text, an end token, or `max_gen_toks` tokens."""
        return self._all(
            "generate",
            [self.ask_generation(*each.args[:2]) for each in requests],
            lambda asked, answers: answers[0].text,
        )

    def ask_likelihood(self, context: str, continuation: str) -> Asked:
        """Return the request for the likelihood of a continuation."""
        if context == "":
            ids = self._form.tokenizer.encode(continuation).astype(np.int64)
            begin = self._prefix_token()
            if len(ids) > 1 and ids[0] == begin:
                return Asked([Request("", ids[:1], answer_ids=ids[1:])], 0)
            return Asked([Request("", np.array([begin]), answer_ids=ids)], 0)
        return self._fitted(context, lambda text: self._pair(text, continuation))

    def ask_rolling(self, text: str) -> Asked:
        """Return the requests for the likelihood of a whole text, each token measured once."""
        ids = self._form.tokenizer.encode(text).tolist()
        longest = self.max_length or len(ids) + 1
        windows = map(
            make_disjoint_window,
            get_rolling_token_windows(ids, self._prefix_token(), max_seq_len=longest - 1, context_len=1),
        )
        requests = [
            Request(text, np.array(context, np.int64), answer_ids=np.array(answer, np.int64))
            for context, answer in windows
        ]
        return Asked(requests, 0)

    def ask_generation(self, context: str, settings: dict[str, Any]) -> Asked:
        """Return the request for an answer.

        Raises:
            ArgumentError: the task wants answers drawn at random.
        """
        if settings.get("do_sample") and float(settings.get("temperature", 1.0)) > 0.0:
            raise ArgumentError("answers are decoded greedily here", found="a task with do_sample: true")
        until = settings.get("until") or []
        stop = (until,) if isinstance(until, str) else tuple(each for each in until if each)
        tokens = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_GEN_TOKENS)

        def make(text: str) -> Request:
            form, message = self._form_of(text)
            return form.request(message, max_new_tokens=tokens, stop=stop)

        return self._fitted(context, make)

    def _fitted(self, context: str, make: Callable[[str], Request]) -> Asked:
        """Return the request for a context, cut until prompt and answer are no longer than the model reads."""
        removed = 0
        for _ in range(_MAX_FITS):
            request = make(context)
            room = request.max_new_tokens if request.answer_ids is None else len(request.answer_ids)
            excess = self._excess(request, room)
            if excess <= 0:
                return Asked([request], removed)
            context, cut = self._shorten(context, excess)
            removed += cut
        raise ArgumentError(
            "a context could not be cut to the model's length", found=f"{excess} tokens too many"
        )

    def _all(self, mode: str, asked: Sequence[Asked], result: Any) -> list[Any]:
        requests = [request for each in asked for request in each.requests]
        answers: list[Answer | None] = [None] * len(requests)
        given = self._answerer.score(requests) if mode == "score" else self._answerer.generate(requests)
        for index, answer in given:
            if answer.error is not None:
                raise RunError(f"the model gave no answer: {answer.error}")
            answers[index] = answer
        rest = iter(answers)
        return [result(each, [next(rest) for _ in each.requests]) for each in asked]

    def _pair(self, context: str, continuation: str) -> Request:
        """Return the request; white space at the end of the context belongs to the continuation."""
        form, message = self._form_of(context)
        if not isinstance(context, ChatText):
            kept = message.rstrip()
            message, continuation = kept, message[len(kept) :] + continuation
        chat = form.before_given_answers()
        prompt_ids = form.encode(message, chat=chat).astype(np.int64)
        whole = form.encode(message, continuation, chat=chat).astype(np.int64)
        return Request(
            message if chat is None else chat.text(message),
            prompt_ids,
            messages=[{"role": "user", "content": message}] if isinstance(context, ChatText) else None,
            answer_ids=whole[len(prompt_ids) :],
        )

    def _form_of(self, context: str) -> tuple[PromptForm, str]:
        if isinstance(context, ChatText):
            return self._form, context.message
        return self._plain, context

    def _excess(self, request: Request, answer_tokens: int) -> int:
        if self.max_length is None:
            return 0
        return len(_ids(request.prompt_ids)) + answer_tokens - self.max_length

    def _shorten(self, context: str, excess: int) -> tuple[str, int]:
        tokenizer: Tokenizer = self._form.tokenizer
        text = context.message if isinstance(context, ChatText) else str(context)
        keep = len(tokenizer.encode(text)) - excess
        if keep < 2:
            raise ArgumentError(
                "the model's length leaves no room for a context", found=f"{self.max_length} tokens"
            )
        cut = cut_middle(text, tokenizer, keep)
        if isinstance(context, ChatText):
            return self.apply_chat_template([{"role": "user", "content": cut.text}]), cut.removed
        return cut.text, cut.removed

    def _prefix_token(self) -> int:
        """Return what a text without a context is measured after: BOS, else EOS."""
        tokenizer = self._form.tokenizer
        for token in (tokenizer.bos_id, tokenizer.eos_id):
            if token is not None:
                return token
        raise ArgumentError("a text without a context is measured after BOS or EOS; the tokenizer has none")


def likelihood(asked: Asked, answers: Sequence[Answer]) -> tuple[float, bool]:
    """Return the sum of the log-likelihoods in nats, and whether every token was the most likely one."""
    total, greedy = 0.0, True
    for request, answer in zip(asked.requests, answers):
        total -= float(np.sum(_ids(answer.nll), dtype=np.float64))
        greedy &= np.array_equal(_ids(answer.token_ids), _ids(request.answer_ids))
    return total, bool(greedy)


def _ids(ids: np.ndarray | None) -> np.ndarray:
    assert ids is not None
    return ids
