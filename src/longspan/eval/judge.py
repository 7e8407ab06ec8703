"""A language model as judge: how well an answer agrees with the reference, from 1 to 10.

    with Client(Endpoint(model="judge", base_url="http://node7:8000/v1"), cache="judge.sqlite") as client:
        judge_file("run/records/needle-before.jsonl", client, "run/records/needle-before-judge.jsonl")

Like any rescoring this reads recorded texts and runs no evaluated model. The score is (rating - 1) / 9, so that a
perfect answer has 1 and a useless one 0; rating and the judge's reply as it came are kept in the sample's `judge`.
A reply without one clear rating leaves the sample unscored, with the reason. The criteria are a template file
(`judge_prompts/`), named and versioned in the header:

    answer_v1   our own: how much of the reference is in the answer
    kamradt_v1  word for word those of Kamradt's needle test, in the frame that langchain's `labeled_score_string` gives
                them, as `--gpt_eval` of FlagEmbedding's Long_LLM asks; a rating is what stands in [[ ]] first
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from longspan.api import ChatRequest, ChatResult, Client
from longspan.core.errors import DataError
from longspan.eval.rescoring import open_for_rescoring, rescored_header, summarise, write_judged

CRITERIA = {"answer": "answer_v1", "kamradt": "kamradt_v1"}
"""Criteria by name, and the templates in use; a change of words is a new file with the next version."""
TEMPLATE = CRITERIA["answer"]
VERSION = 1
"""Raised whenever the same reply would give another score."""
REPLY_TOKENS = 512
"""Most tokens of a reply; models that think first need more than the one line that is asked for."""

_RATING = re.compile(r"(?:rating\s*:\s*)?([0-9]{1,3})(?:\s*/\s*10)?\.?", re.IGNORECASE)
_BRACKETED = re.compile(r"\[\[(.*?)\]\]")
_SYSTEM = {"kamradt_v1": "You are a helpful assistant."}
_LOWEST, _HIGHEST = 1, 10
_NOT_NOW = "failed"


def judge_file(
    records: str | Path,
    client: Client,
    out: str | Path,
    *,
    template: str = TEMPLATE,
    used: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the samples of `records` to `out` with the judge's scores; return a summary as `rescore` does.

    The summary has `mean_rating` too, 1 to 10, None where nothing was rated. A killed run goes on with the samples
    that are missing in `out`.

    Raises:
        ArgumentError, ConfigError, DataError: as `rescore`; or the judge cannot be asked (key, model).
        RunError: some samples were not judged (no answer after all attempts, or the budget is used up); the
            same call asks for them again.
    """
    source = open_for_rescoring(records, out)
    header = rescored_header(source.header, judge_scorer(client, template), used)
    samples = write_judged(
        source,
        header,
        out,
        lambda missing: judge_records(missing, client, template),
        doing="judge",
        says="ratings",
        found=lambda: client.report().describe(),
    )
    ratings = [sample["judge"]["rating"] for sample in samples if sample["score"] is not None]
    return {
        **summarise(header, out, samples),
        "mean_rating": sum(ratings) / len(ratings) if ratings else None,
    }


def judge_records(
    samples: Iterable[Mapping[str, Any]], client: Client, template: str = TEMPLATE
) -> Iterator[dict[str, Any]]:
    """Yield samples with the judge's `score`, `unscored` and `judge` {rating, reply}, as they are judged.

    Samples that had no score are yielded as they are. Those that the endpoint could not answer now are left out.

    Raises:
        DataError: a sample holds no texts.
        UserError, RunError: as `Client.complete`.
    """
    unjudged: list[dict[str, Any]] = []

    def requests() -> Iterator[tuple[Mapping[str, Any], ChatRequest]]:
        for sample in samples:
            if sample.get("unscored") is None:
                yield sample, judge_request(sample, template)
            else:
                unjudged.append({**sample, "score": None})

    for sample, result in client.complete(requests()):
        yield from unjudged
        unjudged.clear()
        if result.error != _NOT_NOW:
            yield _judged(sample, result, template)
    yield from unjudged


def judge_request(sample: Mapping[str, Any], template: str = TEMPLATE) -> ChatRequest:
    """Return what the judge is asked about one sample. Raises DataError: it holds no texts."""
    missing = [name for name in ("expected", "output") if name not in sample]
    if missing:
        raise DataError(f"a sample holds no {missing[0]!r} to judge", found=", ".join(sorted(sample)))
    expected: str | Sequence[str] = sample["expected"]
    text = string.Template(read_template(template)).substitute(
        question=sample.get("question") or "(not recorded)",
        expected=expected if isinstance(expected, str) else "\n".join(expected),
        output=sample["output"],
    )
    messages = [{"role": "system", "content": _SYSTEM[template]}] if template in _SYSTEM else []
    messages.append({"role": "user", "content": text})
    return ChatRequest(messages=tuple(messages), max_tokens=REPLY_TOKENS)


def judge_scorer(client: Client, template: str = TEMPLATE) -> dict[str, Any]:
    """Return what a header says of this scorer."""
    return {"name": "judge", "version": VERSION, "template": template, "model": client.endpoint.model}


def read_template(name: str) -> str:
    """Return a template with the fields $question, $expected and $output."""
    return (resources.files("longspan.eval") / "judge_prompts" / f"{name}.txt").read_text(encoding="utf-8")


def parse_rating(reply: str, template: str = TEMPLATE) -> int | None:
    """Return the rating 1 to 10 in the last line of a reply; None: that line holds anything else.

    `Rating: 7`, `**Rating: 7/10**` and `7` are read. `7.5`, `7 or 8`, `11` and `about 7` are not. By `kamradt_v1`
    the first [[ ]] of the reply decides, where there is one.
    """
    if template == "kamradt_v1" and (bracketed := _BRACKETED.search(reply)):
        reply = bracketed.group(1)
    lines = [line.strip(" \t*_`") for line in reply.splitlines()]
    last = next((line for line in reversed(lines) if line), "")
    match = _RATING.fullmatch(last)
    rating = int(match.group(1)) if match else 0
    return rating if _LOWEST <= rating <= _HIGHEST else None


def _judged(sample: Mapping[str, Any], result: ChatResult, template: str) -> dict[str, Any]:
    rating, reason = None, None
    if result.error is not None:
        reason = f"judge: {result.error}"
    elif result.finish == "length":
        reason = "judge: its reply was cut short"  # "Rating: 1" may be the beginning of 10
    elif (rating := parse_rating(result.text, template)) is None:
        reason = "judge: no rating in its reply"
    return {
        **sample,
        "score": (rating - _LOWEST) / (_HIGHEST - _LOWEST) if rating is not None else None,
        "unscored": reason,
        "judge": {"rating": rating, "reply": result.text},
    }
