from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.longqa import LongQa, LongQaConfig, read_longqa, rule_for
from longspan.eval.prompts import PromptForm
from longspan.eval.records import read_records
from longspan.eval.scorers import SCORERS
from tests.eval.perfect import run_perfect, run_wrong
from tests.eval.tokenizer_styles import build_tokenizer

LONGBENCH = (
    "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader gov_report qmsum "
    "multi_news vcsum trec triviaqa samsum lsht passage_count passage_retrieval_en passage_retrieval_zh lcc "
    "repobench-p"
)


def sample(dataset: str, question: str, answers: Any, **changes: Any) -> dict[str, Any]:
    """Return a line as LongBench releases it."""
    line = {
        "input": question,
        "context": f"A document of {dataset}. " * 20,
        "answers": answers,
        "length": 80,
        "dataset": dataset,
        "language": "en",
        "all_classes": None,
        "_id": f"{dataset}-{question}",
    }
    return {**line, **changes}


SAMPLES = [
    sample("hotpotqa", "Who wrote it?", ["Ada Lovelace", "Countess Lovelace"]),
    sample("hotpotqa", "When?", ["1843"]),
    sample("gov_report", "", ["The agency spent more. It saved less."]),
    sample("trec", "Question: Where?\nType:", ["City"], all_classes=["City", "Food"]),
    sample("passage_retrieval_en", "An abstract.", ["Paragraph 17"]),
    sample("passage_count", "", ["5"]),
    sample("lcc", "", ["    return value"]),
    sample("memoir", "Where was she born?", "London", metric="contains"),
]


@pytest.fixture()
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in SAMPLES))
    return path


def make(path: Path, tokenizer: Tokenizer, **values: Any) -> LongQa:
    return LongQa(LongQaConfig.from_dict(values), PromptForm(tokenizer), read_longqa([path]))


def test_perfect_answers_score_one_and_wrong_ones_zero(
    data_file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Every metric of LongBench that the samples use, each on its own data set."""
    task = make(data_file, tokenizer)
    summary = run_perfect(task, tokenizer, tmp_path / "perfect.jsonl")
    assert {row["dataset"]: row["mean"] for row in summary["by_dataset"]} == dict.fromkeys(
        ["hotpotqa", "gov_report", "trec", "passage_retrieval_en", "passage_count", "lcc", "memoir"], 1.0
    )
    assert {row["kind"]: row["datasets"] for row in summary["by_kind"]} == {
        "multi-document QA": 1,
        "summarization": 1,
        "few-shot learning": 1,
        "synthetic tasks": 2,
        "code completion": 1,
        "other": 1,
    }
    assert run_wrong(task, tokenizer, tmp_path / "wrong.jsonl")["mean"] == 0.0
    records = {record["dataset"]: record for record in read_records(tmp_path / "perfect.jsonl").samples}
    assert (
        records["trec"]["all_classes"] == ["City", "Food"] and records["trec"]["metric"] == "classification"
    )
    assert records["memoir"]["metric"] == "contains" and records["lcc"]["removed_tokens"] == 0


def test_prompts_are_longbenchs(data_file: Path, tokenizer: Tokenizer) -> None:
    """Another wording, room or ending gives scores that stand beside no published one."""
    task = make(data_file, tokenizer)
    requests = {planned.key: task.build(planned).request for planned in task.plan()}
    asked = requests["hotpotqa", 0]
    assert asked.prompt.startswith("Answer the question based on the given passages. Only give me the answer")
    assert asked.prompt.endswith("\n\nQuestion: Who wrote it?\nAnswer:")
    assert (asked.max_new_tokens, asked.stop) == (32, ())
    assert requests["lcc", 0].prompt.startswith("Please complete the code given below. \nA document")
    assert requests["lcc", 0].prompt.endswith("Next line of code:\n")
    assert requests["gov_report", 0].max_new_tokens == 512


def test_every_data_set_of_longbench_has_its_rule() -> None:
    """21 data sets: a scorer that exists, a prompt with the document, few-shot answers cut to a line."""
    rules = {name: rule_for(name) for name in LONGBENCH.split()}
    assert len({rule.prompt for rule in rules.values()}) >= 18  # three of multi-document QA share one
    for rule in rules.values():
        assert rule.metric in SCORERS and "{context}" in rule.prompt and rule.kind != "other"
    assert {name for name, rule in rules.items() if rule.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert {name for name, rule in rules.items() if not rule.chat} == {
        *("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
    }
    assert rule_for("hotpotqa_e") == rules["hotpotqa"]
    assert rule_for("unheard_of").metric == "qa_f1"


def test_long_prompt_loses_its_middle(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The question at the end must survive; how much was taken out is recorded."""
    context = "".join(f"Sentence {number} of the document.\n" for number in range(400))
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text(json.dumps({"context": context, "question": "Who?", "answer": "Ada"}) + "\n")
    task = make(path, tokenizer, max_length=1000)
    (planned,) = task.plan()
    built = task.build(planned)
    assert built.request.prompt_ids is not None
    assert 1000 - 32 - 8 <= len(built.request.prompt_ids) <= 1000 - 32
    assert built.request.prompt.startswith("Answer the question based")
    assert built.request.prompt.endswith("Question: Who?\nAnswer:")
    whole = make(path, tokenizer).build(planned)
    assert whole.request.prompt_ids is not None
    removed = len(whole.request.prompt_ids) - len(built.request.prompt_ids)
    assert built.fields["removed_tokens"] == pytest.approx(removed, abs=8)
    assert built.fields["length"] == len(built.request.prompt_ids)


def test_room_for_nothing_but_the_answer_is_a_reason(data_file: Path, tokenizer: Tokenizer) -> None:
    task = make(data_file, tokenizer, datasets=["gov_report"], max_length=512)
    with pytest.raises(DataError, match="0 tokens for the prompt"):
        task.build(task.plan()[0])


def test_chat_is_for_questions_not_for_examples(data_file: Path, tmp_path: Path) -> None:
    """LongBench puts few-shot examples and code as plain text to chat models too."""
    tokenizer = build_tokenizer("llama-3", tmp_path / "llama-3")
    chat = PromptForm(tokenizer, chat_template="llama-3")
    task = LongQa(LongQaConfig(), chat, read_longqa([data_file]))
    requests = {planned.key[0]: task.build(planned).request for planned in task.plan()}
    assert requests["hotpotqa"].messages is not None
    assert requests["trec"].messages is None and requests["lcc"].messages is None


def test_questions_on_one_document_stand_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """They share all but their last lines, which is read once where they are given together."""
    lines = [
        {"context": f"Document {place % 2}. " * 30, "question": f"What is {place}?", "answer": "it"}
        for place in range(6)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = make(path, tokenizer).plan()
    assert [planned.key[1] for planned in plan] == [0, 2, 4, 1, 3, 5]
    assert len({planned.group for planned in plan}) == 2
    assert {planned.key[0] for planned in plan} == {"own"}


def test_first_samples_and_chosen_data_sets(data_file: Path, tokenizer: Tokenizer) -> None:
    task = make(data_file, tokenizer, datasets=["hotpotqa", "lcc"], samples=1)
    assert [planned.key for planned in task.plan()] == [("hotpotqa", 0), ("lcc", 0)]
    with pytest.raises(ArgumentError, match="no such data set"):
        LongQa.from_config(
            LongQaConfig(datasets=("hotpot",)), TaskDataConfig(paths=(str(data_file),)), PromptForm(tokenizer)
        )


def test_lines_that_are_no_questions_are_left_out_by_name(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """One line without a field ended the evaluation, and an answer of null was asked for as the word None."""
    good = SAMPLES[0]
    broken = [
        {"context": "a", "input": "b"},
        {"context": "a", "answers": ["c"]},
        {"input": "b", "answers": ["c"]},
        {**good, "context": 5},
        {**good, "answers": [None]},
        {**good, "answers": {"value": "x"}},
        {**good, "all_classes": "City"},
        {**good, "metric": 5},
        {**good, "input": "half \ud83d"},
        [good],
    ]
    path = tmp_path / "broken.jsonl"
    lines = [json.dumps(each) for each in (good, *broken)]
    path.write_text("\n".join([*lines, '{"cut": ', json.dumps(good)]))
    with caplog.at_level("WARNING"):
        data = read_longqa([path])
    assert len(data.samples) == 2 and data.left_out == len(broken) + 1
    assert "broken.jsonl:2: not a question on a document (fields context, input)" in caplog.text
    assert LongQa(LongQaConfig(), PromptForm(tokenizer), data).params()["left_out_records"] == data.left_out
    with pytest.raises(DataError, match=r"broken\.jsonl:2: not a question(.|\n)*--strict"):
        read_longqa([path], strict=True)
    path.write_text(lines[0] + '\n{"cut": ')
    with pytest.raises(DataError, match=r"broken\.jsonl:2: (.|\n)*--strict"):
        read_longqa([path], strict=True)
    path.write_text(json.dumps(broken[0]))
    with pytest.raises(DataError, match=r"hold no samples(.|\n)*broken\.jsonl:1: not a question"):
        read_longqa([path])
    with pytest.raises(DataError, match="is a folder"):
        read_longqa([tmp_path])
    with pytest.raises(DataError, match="does not exist"):
        read_longqa([tmp_path / "no"])


def test_files_of_questions_are_read_as_they_come(tmp_path: Path) -> None:
    """The last question was lost where no line end follows it; U+2028 and a byte order mark are no mistakes."""
    rows = [{**SAMPLES[0], "context": f"{number}\u2028 more"} for number in range(3)]
    lines = "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "mine.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "mine.txt").write_text(lines, encoding="utf-8")
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("mine.jsonl", "mine.txt", "mine.json", "mine.jsonl.gz"):
        found = read_longqa([tmp_path / name]).samples
        assert [each.context for each in found] == [row["context"] for row in rows], name
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress(b'{"context": "a", "input": "b", "answer": 5}'))
    (sample,) = read_longqa([tmp_path / "mine.jsonl.gz"]).samples
    assert (sample.dataset, sample.answers) == ("mine", ["5"])


def test_metric_that_is_none_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """It is said before a model is loaded, not at the last sample."""
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({**SAMPLES[0], "metric": "no_such"}) + "\n")
    with pytest.raises(ArgumentError, match="no_such"):
        make(path, tokenizer)
    path.write_text(json.dumps(sample("trec", "Where?", ["City"])) + "\n")
    with pytest.raises(DataError, match="no all_classes"):
        make(path, tokenizer)
    with pytest.raises(ConfigError):
        LongQaConfig.from_dict({"max_lenght": 5})
