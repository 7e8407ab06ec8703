"""NeedleBench's needle tasks on a stand-in of its data: prompts, answers, scores, weights."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from longspan.core.errors import ConfigError, DataError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.released.needlebench import NeedleBench, NeedleBenchConfig
from longspan.eval.runner import run_task
from longspan.eval.scorers import scorer_named
from tests.eval.answerers import Knowing

# Letters that the tokenizer of these tests never saw in training, so each is a token of its own.
TEXTS = [40 * text for text in ("####%%%%", "@@@@&&&&", "^^^^~~~~")]
MULTI = """
import nothing_that_is_there

def get_random_needles(language):
    if language == 'Chinese':
        retrieval_question = f"\\u8c01\\u6bd4'{last_person}'\\u5e74\\u957f"
    elif language == 'English':
        retrieval_question = f"Who is older than '{last_person}'?"

def load(language, quesiton_position):
    if language == 'Chinese':
        prompt = f'''\\u8bfb{context}|{retrieval_question}|\\\\boxed{{}}{last_person}'''
    elif quesiton_position == 'End':
        prompt = f'''Read {context}|{retrieval_question}|\\\\boxed{{}} {last_person}'''
    else:
        prompt = f'''{retrieval_question}{context}{last_person}'''
"""
ISLE, ITEM = "\u5c9b", "\u7247"


def needle(number: int) -> list[dict[str, str]]:
    asked = f"What is on {number}?"
    chinese = f"{ISLE}{number}\uff1f\u8bf7\u6309\u7167'{ISLE}{number}\u662f__\u3002'\u7684\u683c\u5f0f"
    chinese += "\u56de\u7b54\u3002"
    return [
        {
            "needle": f"Q{number}Z",
            "retrieval_question": f"{asked} Please answer in the format 'It is __ on {number}.'",
            "arg1": f"I{number % 3}",
            "arg2": f"S{number}",
            "language": "English",
        },
        {
            "needle": f"{ISLE}{number}{ITEM}",
            "retrieval_question": chinese,
            "arg1": f"{ISLE}{number}",
            "arg2": f"{ITEM}{number}",
            "language": "Chinese",
        },
    ]


def write_released(root: Path) -> Path:
    """Write the data set and the code of the second version into a folder."""
    root.mkdir(exist_ok=True)
    for name in ("PaulGrahamEssays.jsonl", "zh_finance.jsonl"):
        (root / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    rows = [each for number in range(5) for each in needle(number)]
    (root / "needles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"English": "XA,XB,XC,XD", "Chinese": "JA,JB,JC,JD"}
    (root / "names.json").write_text(json.dumps(names))
    chains = [
        {
            "derivation_count": count,
            "derivations": ["QX", "QZ", "QW"][:count],
            "question": f"Q{count}?",
            "answer": "X Z",
        }
        for count in (2, 3)
    ]
    for ending in ("en", "zh"):
        (root / f"multi_needle_reasoning_{ending}.json").write_text(json.dumps(chains))
    (root / "atc.py").write_text(
        "".join(
            f"relationship_templates_{name} = ['{{A}} {{relationship}} {{B}}']\n"
            f"relationship_terms_{name} = ['Q', 'W']\n"
            for name in ("en", "zh_CN")
        )
    )
    (root / "multi.py").write_text(MULTI)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_released(tmp_path / "nb")


def task(root: Path, tokenizer: Tokenizer, **values: Any) -> NeedleBench:
    given = {
        "size": "4k",
        "depths": [0, 0.5, 1],
        "num_needles": [2],
        "prompts": str(root),
        "samples": 2,
        **values,
    }
    data = TaskDataConfig(paths=(str(root),))
    return NeedleBench.from_config(NeedleBenchConfig.from_dict(given), data, PromptForm(tokenizer))


# SHA-256 of prompts that OpenCompass's own code makes of these files: version, part, depth, of the second sample.
PUBLISHED = {
    ("v1", "single_retrieval_en", 0.5): "7a3f44ba349f",
    ("v1", "single_retrieval_zh", 1.0): "b3d848312837",
    ("v1", "multi_retrieval_en", 0.0): "c460df495ac1",
    ("v1", "multi_retrieval_zh", 0.0): "2be9b74ec030",
    ("v1", "reasoning_3_en", 0.5): "0906d2e102c1",
    ("v1", "reasoning_2_zh", 1.0): "b4723e04a80b",
    ("v2", "single_retrieval_en", 0.5): "4d7365c64c01",
    ("v2", "single_retrieval_zh", 0.5): "f2873c178802",
    ("v2", "multi_retrieval_en", 0.0): "14a5215733f3",
    ("v2", "multi_retrieval_zh", 0.0): "c0d7ddc88bcc",
    ("v2", "reasoning_3_en", 0.5): "6185a176f202",
    ("v2", "reasoning_2_zh", 1.0): "2ced5dffb756",
}
"""Of v2's reasoning the context alone, as the prompt is the stand-in's."""


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_prompts_are_those_of_the_release(root: Path, tokenizer: Tokenizer, version: str) -> None:
    """Texts, needles, persons, places and words: a needle one token off, or a text out of turn, is none of it."""
    whole = task(root, tokenizer, version=version, lengths=[1016], num_needles=[2, 3])
    planned = {
        (version, *map(str, each.key[:1]), each.key[2]): each for each in whole.plan() if each.key[3] == 1
    }
    assert len(planned) == 2 * (3 + 1 + 2 * 3)
    for place, digest in PUBLISHED.items():
        if place[0] == version:
            prompt = whole.build(planned[place]).request.prompt
            if version == "v2" and "reasoning" in place[1]:
                read, asked, form = prompt.rsplit("|", 2)
                prompt = read.removeprefix("Read ").removeprefix("\u8bfb")
                assert (
                    asked in ("Who is older than 'XD'?", "\u8c01\u6bd4'JA'\u5e74\u957f")
                    and form[:8] == "\\boxed{}"
                )
            assert sha256(prompt.encode()).hexdigest()[:12] == digest, place
    built = whole.build(planned[version, "multi_retrieval_en", 0.0])
    assert built.expected == ["S2", "S0", "S4"], "no two of one subject"


def test_what_is_asked_and_what_it_counts_for(root: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Kinds count by their published weights, not by how many samples they have; a part has no overall score."""
    for version, overall in (("v2", 1 / 3), ("v1", 0.4 + 0.3 * 0.5)):
        whole = task(root, tokenizer, version=version, lengths=[1016])
        known = {}
        for planned in whole.plan():
            built = whole.build(planned)
            single = planned.key[0].startswith("single")
            # Of v1's "X Z" half is said.
            known[built.request.prompt] = (
                built.expected[0] if single else "x" if "reason" in planned.key[0] else ""
            )
        answerer = Knowing(tokenizer, knows=known.__getitem__)
        summary = run_task(whole, answerer, tokenizer=tokenizer, label="m", out=tmp_path / f"{version}.jsonl")
        assert summary["overall"] == pytest.approx(overall)
        assert summary["by_length"] == [{"length": 1016, "mean": pytest.approx(overall)}]
        assert [row["kind"] for row in summary["by_kind"]] == [
            "multi_retrieval",
            "reasoning",
            "single_retrieval",
        ]
    some = task(
        root, tokenizer, kinds=["single_retrieval"], languages=["Chinese"], samples=None, lengths=[600]
    )
    assert len(some.plan()) == 3 * 10
    assert some.summary([{"subtask": "single_retrieval_zh", "length": 1000, "score": 1.0}])["overall"] is None


@pytest.mark.parametrize(
    ("scorer", "expected", "output", "score"),
    [
        ("needlebench_keywords", ["S1", "S2", "s3", "S4"], "S1, S22 and S3", 0.5),
        ("needlebench_needle", ["S3"], "It is S3.", 1.0),
        ("needlebench_needle", ["S3"], "Q3 Z", 0.2),
        ("needlebench_needle", ["S3"], "Q4Zs3", 0.2 * 0.4),
        ("needlebench_needle", ["S3"], "", 0.0),
        ("needlebench_words", ["X Z"], "zebra", 0.5),
        ("needlebench_words", ["Ada  Hill"], "HILLary, Ada", 1.0),
    ],
)
def test_scores_are_those_of_the_release(scorer: str, expected: list[str], output: str, score: float) -> None:
    """Each score is what OpenCompass's own code gives for this output."""
    fields = {"needle": "Q3Z"}
    assert scorer_named(scorer).score(expected, output, fields) == pytest.approx(score)


def test_files_that_are_none(root: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """What is missing is said before a model is asked; a haystack that is too short is no shorter prompt."""
    with pytest.raises(
        DataError, match=r"shorter than the 9,500 tokens that are wanted of it\n  found: 960 tokens"
    ):
        task(root, tokenizer, lengths=[10_000], languages=["English"])
    with pytest.raises(DataError, match="too few needles that differ for 4 depths\n  found: 3 in English"):
        task(root, tokenizer, lengths=[600], depths=[0, 0.1, 0.2, 1])
    with pytest.raises(DataError, match="no chains of 5 facts"):
        task(root, tokenizer, lengths=[600], version="v1", num_needles=[5])
    with pytest.raises(ConfigError, match="reads the released folder needlebench_v2"):
        NeedleBenchConfig.from_dict({})
    task(root, tokenizer, size="32k", lengths=[600], kinds=["single_retrieval"])
    assert "600 tokens of size 32k hold no haystack" in caplog.text
    (root / "names.json").unlink()
    with pytest.raises(DataError, match=r"names.json of NeedleBench is not there"):
        task(root, tokenizer, lengths=[600], kinds=["reasoning"])
    (root / "more").mkdir()
    (root / "more" / "names.json").write_text("{}")
    (root / "names.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"names.json of NeedleBench is there more than once\n  found: .*more"
    ):
        task(root, tokenizer, lengths=[600], kinds=["reasoning"])
    (root / "more" / "names.json").unlink()
    write_released(root)
    (root / "multi.py").write_text(MULTI.replace("{retrieval_question}", "{question}"))
    with pytest.raises(DataError, match="question and prompt of the reasoning task in English"):
        task(root, tokenizer, lengths=[600])
    row = {**needle(0)[0], "retrieval_question": "What?"}
    (root / "needles.jsonl").write_text(json.dumps(row))
    one = task(root, tokenizer, lengths=[600], depths=[0], kinds=["multi_retrieval"], languages=["English"])
    with pytest.raises(DataError, match="does not say how to answer"):
        one.build(one.plan()[0])
