"""NoLiMa, BABILong, LongBench v2 and LV-Eval on stand-ins of the released files' structure."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from longspan.core.errors import ConfigError, DataError
from longspan.core.records import read_jsonl
from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.records import read_records
from longspan.eval.released.babilong import Babilong, BabilongConfig, place_of, read_prompts
from longspan.eval.released.longbench_v2 import LongBenchV2, LongBenchV2Config
from longspan.eval.released.lveval import LvEval, LvEvalConfig, rules
from longspan.eval.released.nolima import Book, Nolima, NolimaConfig
from longspan.eval.runner import run_task
from longspan.eval.scorers import scorer_named
from tests.eval.answerers import Knowing
from tests.eval.conftest import make_text
from tests.eval.perfect import run_perfect, run_wrong

NEEDLES: list[dict[str, Any]] = [
    {
        "id": "0401",
        "needle": "Actually, {CHAR} lives next to the {1}.",
        "questions": {"onehop": "Who has been to {2}?", "direct": "Who lives next to the {1}?"},
        "character_set": ["Yuki", "Stuart", "Katie"],
        "tests": {"T01": {"input_args": ["Semper Opera", "Dresden"]}},
    },
    {
        "id": "0407Inv",
        "needle": "The colour of the {1} is red.",
        "questions": {"twohop": "What of the {1}?"},
        "tests": {"T02": {"input_args": ["key"], "gold_answers": ["red", "scarlet"]}},
        "distractors": {"twohop": "There is a blue {1}."},
        "task_template": "{haystack}\n\n{question}",
    },
]


def data(*paths: Path, strict: bool = False) -> TaskDataConfig:
    return TaskDataConfig(paths=tuple(map(str, paths)), strict=strict)


def choice_row(number: int) -> dict[str, Any]:
    """Return a row as THUDM/LongBench-v2 has them."""
    choices = {f"choice_{letter}": f"choice {letter}{number}" for letter in "ABCD"}
    kinds = {
        "difficulty": ("easy", "hard")[number % 2],
        "length": ("short", "medium", "long")[number % 3],
        "domain": "Code",
    }
    context, answer = make_text(number, 12), "ABCD"[number % 4]
    return {**choices, **kinds, "context": context, "question": f"Which {number}?", "answer": answer}


@pytest.fixture
def nolima(tmp_path: Path) -> Path:
    (tmp_path / "needle_set.json").write_text(json.dumps(NEEDLES))
    for name in ("b", "a"):
        (tmp_path / f"book_{name}.txt").write_text("\n".join(make_text(ord(name) + n, 12) for n in range(16)))
    return tmp_path


def test_needles_in_books(nolima: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A needle elsewhere, another name or another order of draws is another test than the published one."""
    (tmp_path / "form.md").write_text("Read.\n{haystack}\nSay {question}")
    wanted = {"lengths": [300, 600], "num_depths": 4, "template": str(tmp_path / "form.md")}
    config = NolimaConfig.from_dict(wanted)
    task = Nolima.from_config(config, data(nolima), PromptForm(tokenizer))
    planned = task.plan()
    assert len(planned) == 2 * 2 * 4 * 2 and {p.fields["question_type"] for p in planned} == {
        "onehop",
        "twohop",
    }
    names = [task.build(p).expected for p in planned if p.key[:3] == ("0401", "T01_onehop", "book_a")]
    # numpy's RandomState(42 + 401).choice, one draw a depth; the second book has the next seed
    assert names == [["Stuart"], ["Yuki"], ["Katie"], ["Katie"]] * 2
    built = task.build(next(p for p in planned if p.key[0] == "0407Inv" and p.key[-2:] == (600, 2)))
    assert built.expected == ["red", "scarlet"] and built.request.prompt.endswith("\n\nWhat of the key?")
    assert (
        " There is a blue key.\n" in built.request.prompt
        and " The colour of the key is red.\n" in built.request.prompt
    )
    assert run_perfect(task, tokenizer, tmp_path / "perfect.jsonl")["mean"] == 1.0
    assert run_wrong(task, tokenizer, tmp_path / "wrong.jsonl")["mean"] == 0.0


def test_a_needle_follows_the_line_break_behind_its_depth(tokenizer: Tokenizer) -> None:
    """The last line before it is cut at its end; a book too short for a haystack is said, not filled up."""
    text = "".join(f"line {number} of a book\n" for number in range(60))
    book = Book(text, tokenizer)
    for depth in (0.0, 0.4, 1.0):
        placed = book.placed("It lies here.", 100, depth)
        before, found, behind = placed.partition(" It lies here.\n")
        assert found and text.startswith(before[:0]) and before in text and behind in text
        share = len(tokenizer.encode(before)) / 100
        assert abs(share - depth) < 0.2
        assert not before or text[text.index(before) + len(before)] == "\n"
    with pytest.raises(DataError, match="holds no haystack of 100,000"):
        book.placed("It", 100_000, 0.5)


def test_needle_sets_that_are_none(nolima: Path, tokenizer: Tokenizer) -> None:
    """A wrong file is one message before work begins."""
    form = PromptForm(tokenizer)
    with pytest.raises(DataError, match="NoLiMa needs books"):
        Nolima.from_config(NolimaConfig(), data(nolima / "book_a.txt"), form)
    with pytest.raises(DataError, match="no prompt of its own"):
        Nolima.from_config(NolimaConfig(), data(nolima), form)
    (nolima / "bad.md").write_text("{question}")
    with pytest.raises(DataError, match="no place for"):
        Nolima.from_config(NolimaConfig(template=str(nolima / "bad.md")), data(nolima), form)
    with pytest.raises(DataError, match="no such questions"):
        Nolima.from_config(NolimaConfig(questions=("threehop",)), data(nolima), form)
    (nolima / "needle_set.json").write_text('[{"id": 3}]')
    with pytest.raises(DataError, match="no needle set of NoLiMa"):
        Nolima.from_config(NolimaConfig(), data(nolima), form)
    (nolima / "other.json").write_text("[]")
    (nolima / "needle_set.json").rename(nolima / "third.json")
    with pytest.raises(DataError, match="several needle sets"):
        Nolima.from_config(NolimaConfig(), data(nolima), form)


@pytest.fixture
def babilong(tmp_path: Path) -> Path:
    for task, length, target in (("qa1", "0k", "kitchen"), ("qa1", "1k", "office"), ("qa6", "1k", "yes")):
        rows = [
            {"input": f" {length} {make_text(n, 8)}\n", "question": f"Where {task} {n}?", "target": target}
            for n in range(2)
        ]
        path = tmp_path / "data" / task / f"{length}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([*rows, {"input": "no question"}]))
    parts = {"instruction": "Read.", "examples": "Like this.", "post_prompt": "Say it."}
    prompts = f"import nothing_there\n\nDEFAULT_PROMPTS = { ({'qa1': parts, 'qa6': parts})!r}\n"
    (tmp_path / "prompts.py").write_text(prompts)
    return tmp_path


def test_facts_in_books(
    babilong: Path, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The published prompt has four parts; files of other tasks and lengths are not read."""
    form, prompts = PromptForm(tokenizer), babilong / "prompts.py"
    config = BabilongConfig.from_dict({"subtasks": ["qa1", "qa6"], "prompts": str(prompts)})
    task = Babilong.from_config(config, data(babilong / "data"), form)
    assert {(p.fields["subtask"], p.fields["length"]) for p in task.plan()} == {
        ("qa1", 256),
        ("qa1", 1024),
        ("qa6", 1024),
    }
    prompt = task.build(task.plan()[0]).request.prompt
    assert prompt.startswith("Read.\n\nLike this.\n\nSay it.\n\n<context>\n")
    assert prompt.endswith("\n</context>\n\nQuestion: Where qa1 0?") and "3 rows are left out" in caplog.text
    assert run_perfect(task, tokenizer, tmp_path / "perfect.jsonl")["mean"] == 1.0
    assert run_wrong(task, tokenizer, tmp_path / "wrong.jsonl")["mean"] == 0.0
    assert str(prompts) not in json.dumps(read_records(tmp_path / "perfect.jsonl").header["params"])
    plain = Babilong.from_config(BabilongConfig(lengths=("1k",)), data(babilong / "data"), form)
    assert plain.build(plain.plan()[0]).request.prompt.startswith("<context>\n")
    assert len(plain.plan()) == 2 and "no instruction" in caplog.text
    with pytest.raises(DataError, match="has no field 'question'"):
        Babilong.from_config(BabilongConfig(), data(babilong / "data", strict=True), form)
    with pytest.raises(ConfigError, match="there is no qa21"):
        BabilongConfig.from_dict({"subtasks": ["qa21"]})
    with pytest.raises(DataError, match="holds no prompt of qa2"):
        Babilong.from_config(BabilongConfig(prompts=prompts), data(babilong / "data"), form)
    prompts.write_text("DEFAULT_PROMPTS = open('/etc/passwd')")
    with pytest.raises(DataError, match=r"prompts\.py does not hold what is read of it"):
        read_prompts(prompts)


def test_places_of_files() -> None:
    """Two layouts of the hub; a length or task inside another word is none."""
    assert place_of("data/qa10/128k.json") == ("qa10", "128k")
    assert place_of("1M/qa2-00000-of-00001.parquet") == ("qa2", "1M")
    assert place_of("sqa1/12kb.json") == ("", "")


def test_choices_of_longbench_v2(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prompt, cut and table: by difficulty and size, the domain beside them."""
    rows = [choice_row(number) for number in range(12)]
    (tmp_path / "data.json").write_text(json.dumps([*rows, {**rows[0], "answer": "E"}]))
    config = LongBenchV2Config.from_dict({"max_length": 400})
    task = LongBenchV2.from_config(config, data(tmp_path / "data.json"), PromptForm(tokenizer))
    built = task.build(task.plan()[0])
    assert built.request.prompt.endswith(
        '(D) choice D0\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
    )
    assert built.fields["achieved_length"] + 128 <= 400 and built.fields["truncated"] > 0
    right = f"**The correct answer is ({built.expected})**"
    assert scorer_named("longbench_v2").score(built.expected, right) == 1.0
    assert scorer_named("longbench_v2").score("B", "The correct answer is A, not (B)") == 0.0
    summary = run_wrong(task, tokenizer, tmp_path / "wrong.jsonl")
    assert [row["size"] for row in summary["by_size"]] == ["long", "medium", "short"]
    assert [row["category"] for row in summary["by_category"]] == ["Code"] and summary["truncated"] == 12
    alone = LongBenchV2Config(no_context=True)
    task = LongBenchV2.from_config(alone, data(tmp_path / "data.json"), PromptForm(tokenizer))
    assert task.build(task.plan()[0]).request.prompt.startswith(
        "What is the correct answer to this question: Which 0?"
    )
    with pytest.raises(DataError, match="names no choice"):
        LongBenchV2.from_config(alone, data(tmp_path / "data.json", strict=True), PromptForm(tokenizer))


def test_longbench_v2_reasons_first(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The letter is read from the second answer, which is given the reasoning and not the document; a letter that the
    reasoning names is none. Digests are those of the released prompts, filled in by replacing."""
    (tmp_path / "data.json").write_text(json.dumps([choice_row(0), choice_row(1)]))
    config = LongBenchV2Config(reason=True)
    task = LongBenchV2.from_config(config, data(tmp_path / "data.json"), PromptForm(tokenizer))

    def knows(prompt: str) -> str:
        if prompt.endswith("step by step:"):
            return " It says so. \n" if "Which 0?" in prompt else "The correct answer is (B)"
        return "The correct answer is (A)"

    answerer = Knowing(tokenizer, knows=knows)
    summary = run_task(task, answerer, tokenizer=tokenizer, label="m", out=tmp_path / "out.jsonl")
    prompts = [request.prompt for request in answerer.seen]
    assert [hashlib.sha256(prompts[n].encode()).hexdigest()[:16] for n in (0, 2)] == [
        "2bfc1c90a670575e",
        "042d9042e4ce21a9",
    ]
    assert [request.max_new_tokens for request in answerer.seen] == [1024, 1024, 128, 128]
    records = [record for record in read_jsonl(tmp_path / "out.jsonl") if record["kind"] == "sample"]
    found = {record["expected"]: record for record in records}
    assert found["A"]["score"] == 1.0 and found["B"]["score"] == 0.0 and summary["mean"] == 0.5
    assert found["A"]["reasoning"] == " It says so. \n" and found["A"]["output"].endswith("(A)")
    assert found["A"]["seconds"] == 0.5 and found["A"]["prompt_tokens"] > 200
    with pytest.raises(ConfigError, match="choose one"):
        LongBenchV2Config.from_dict({"reason": True, "no_context": True})


def test_questions_of_lveval(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Data set and length are the file's; an answer without the key words scores 0."""
    row = {
        "context": make_text(1, 10),
        "input": "Who {x}?",
        "answers": ["Ada wrote it", "no"],
        "answer_keywords": "Ada",
    }
    for name in ("hotpotwikiqa_mixup_16k", "factrecall_en_32k", "other_16k", "hotpotwikiqa_mixup_64k"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n{}\n")
    config = LvEvalConfig(lengths=(16, 32))
    task = LvEval.from_config(config, data(tmp_path), PromptForm(tokenizer))
    assert [p.key[:2] for p in task.plan()] == [("factrecall_en", 32000), ("hotpotwikiqa_mixup", 16000)]
    built = task.build(task.plan()[1])
    assert built.request.prompt.endswith("Question: Who {x}?\nAnswer:") and built.expected == ["Ada wrote it"]
    score = scorer_named("by_metric").score
    assert score(built.expected, "It was Ada", built.fields) == pytest.approx(2 * 2 / 6)
    assert score(built.expected, "She wrote it", built.fields) == 0.0
    summary = run_perfect(task, tokenizer, tmp_path / "perfect.jsonl")
    assert [(row["kind"], row["length"], row["mean"]) for row in summary["by_kind"]] == [
        ("multi-hop QA", 16000, 1.0),
        ("single-hop QA", 32000, 1.0),
    ]
    assert len(rules()) == 11
    with pytest.raises(ConfigError, match="there is no nothing"):
        LvEvalConfig.from_dict({"subtasks": ["nothing"]})


def test_files_of_one_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Of two files of one name the second took the place of the first, without a word."""
    for number in (1, 2):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "data.json").write_text(json.dumps([choice_row(number)]))
    both = LongBenchV2.from_config(LongBenchV2Config(), data(tmp_path), PromptForm(tokenizer))
    assert len(both.plan()) == 2
    with pytest.raises(DataError, match="two files have one name"):
        LongBenchV2.from_config(
            LongBenchV2Config(), data(tmp_path / "1", tmp_path / "2"), PromptForm(tokenizer)
        )
