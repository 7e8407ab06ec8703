"""Questions with documents for RULER's qa_1 and qa_2, from the files that SQuAD and HotpotQA are released as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from longspan.core.errors import DataError
from longspan.core.files import read_json, sha256_file

QaTask = Literal["qa_1", "qa_2"]


class QaQuestion(NamedTuple):
    """A question and the documents that belong to it, as indices."""

    text: str
    answers: list[str]
    needed: list[int]
    """Documents without which it cannot be answered."""
    related: list[int]
    """Other documents of the same article."""


class QaData(NamedTuple):
    """What one file holds."""

    task: QaTask
    questions: list[QaQuestion]
    documents: list[str]
    """All different ones, in alphabetical order."""
    sha256: str
    """Of the file."""


def read_qa(path: str | Path) -> QaData:
    """Read SQuAD 2 (`dev-v2.0.json`, qa_1) or HotpotQA (`hotpot_dev_distractor_v1.json`, qa_2).

    Raises:
        DataError: the file is neither, or holds no question that has an answer.
    """
    content = read_json(path)
    try:
        if isinstance(content, dict) and "data" in content:
            task: QaTask = "qa_1"
            documents, questions = _squad(content["data"])
        elif isinstance(content, list):
            task = "qa_2"
            documents, questions = _hotpot(content)
        else:
            raise KeyError("data")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is neither SQuAD nor HotpotQA as they are released",
            found=f"{type(error).__name__}: {error}",
            allowed="SQuAD 2's dev-v2.0.json, HotpotQA's hotpot_dev_distractor_v1.json",
        ) from None
    if not questions:
        raise DataError(f"{path} holds no question with an answer")
    return QaData(task, questions, documents, sha256_file(path))


def _squad(articles: list[dict[str, Any]]) -> tuple[list[str], list[QaQuestion]]:
    paragraphs = [[str(each["context"]) for each in article["paragraphs"]] for article in articles]
    documents, place = _numbered(text for article in paragraphs for text in article)
    questions = []
    for article, texts in zip(articles, paragraphs):
        inside = list(dict.fromkeys(place(text) for text in texts))
        for paragraph, text in zip(article["paragraphs"], texts):
            related = [index for index in inside if index != place(text)]
            for asked in paragraph["qas"]:
                answers = [str(answer["text"]) for answer in asked["answers"]]
                if answers and not asked.get("is_impossible", False):
                    questions.append(QaQuestion(str(asked["question"]), answers, [place(text)], related))
    return documents, questions


def _hotpot(items: list[dict[str, Any]]) -> tuple[list[str], list[QaQuestion]]:
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]] for item in items]
    documents, place = _numbered(text for texts in contexts for text in texts)
    questions = [
        QaQuestion(str(item["question"]), [str(item["answer"])], [place(text) for text in texts], [])
        for item, texts in zip(items, contexts)
    ]
    return documents, questions


def _numbered(texts: Any) -> tuple[list[str], Callable[[str], int]]:
    documents = sorted(set(texts))
    return documents, {text: index for index, text in enumerate(documents)}.__getitem__
