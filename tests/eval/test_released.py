"""Released evaluation sets read from their files: a perfect answer scores 1, prompts are the published ones."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from longspan.core.errors import ArgumentError, DataError
from longspan.core.records import read_jsonl
from longspan.eval.prompts import PromptForm
from longspan.eval.released import helmet, longllm
from longspan.eval.released.mmlu import category_means, run_mmlu
from longspan.eval.released.rows import Rows, find_rows
from longspan.eval.released.sets import ReleasedTask
from longspan.eval.runner import run_task
from longspan.eval.scorers import scorer_named
from longspan.eval.summaries import mean_by, means_of_means
from longspan.infer.requests import Answer


class Knowing:
    """Answers what it is told by the end of the prompt; keeps what it was asked."""

    max_length = None

    def __init__(self, identity, reply) -> None:
        self.identity, self._reply, self.asked = identity, reply, []

    def generate(self, requests):
        for index, request in enumerate(requests):
            self.asked.append(request)
            yield index, Answer(self._reply(len(self.asked) - 1, request), prompt_tokens=1)

    def score(self, requests):
        """Find the letter C the likeliest."""
        for index, request in enumerate(requests):
            self.asked.append(request)
            yield index, Answer("", nll=np.array([float(self._reply(index, request) != "C")]))

    def close(self) -> None:
        pass


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(task, model_info, tokenizer, out, *, reply=None):
    """Run a task; by default the first expected answer is given."""
    built = [task.build(planned) for planned in task.plan()]
    perfect = {each.request.prompt: each.expected[0] for each in built}
    knowing = Knowing(model_info, reply or (lambda index, request: perfect[request.prompt]))
    summary = run_task(task, knowing, tokenizer=tokenizer, label="a", out=out)
    samples = [record for record in read_jsonl(out) if record["kind"] == "sample"]
    return summary, samples, knowing.asked


LONGBENCH = {
    "narrativeqa": {"input": "Who?", "context": "Ada wrote.", "answers": ["Ada", "Ada L."]},
    "trec": {
        "input": "Question: Who?\nType:",
        "context": "Question: Where?\nType: Location\n",
        "answers": ["Human"],
        "all_classes": ["Human", "Location"],
    },
    "lcc": {"input": "", "context": "x = 1\n", "answers": ["y = 2"]},
    "passage_count": {"input": "", "context": "Paragraph 1: a", "answers": ["1"]},
    "gov_report": {"input": "", "context": "A report.", "answers": ["The report says this and that."]},
}


def test_longbench_as_long_llm_runs_it(tmp_path, tokenizer, model_info):
    """Prompts, ends of answers and metrics per data set; the first line of a few-shot answer counts."""
    for name, row in LONGBENCH.items():
        write_lines(tmp_path / "longbench" / f"{name}.jsonl", [row])
    sets = longllm.open_sets(tmp_path, "longbench", list(LONGBENCH))
    task = ReleasedTask(sets, PromptForm(tokenizer))
    summary, samples, asked = run(task, model_info, tokenizer, tmp_path / "a.jsonl")
    assert summary["mean"] == 1.0
    assert {sample["subtask"]: sample["metric"] for sample in samples} == {
        "narrativeqa": "qa_f1",
        "trec": "classification_closest",
        "lcc": "code_sim",
        "passage_count": "count",
        "gov_report": "rouge_l_summary",
    }
    by_prompt = {request.prompt[:30]: request for request in asked}
    story = by_prompt["You are given a story, which c"]
    assert story.stop == () and story.max_new_tokens == 128
    assert "Story: Ada wrote.\n\n" in story.prompt and story.prompt.endswith("Question: Who?\n\nAnswer:")
    assert set(summary["by_category"]) >= {"few-shot learning", "code completion"}
    assert summary["averages"] == [{"dataset": "longbench", "sets": 5, "without": 0, "mean": 1.0}]
    # A chat model that begins with an empty line has not ended its answer.
    labels = iter(["\nHuman\nQuestion: Location?"] * 9)
    again = ReleasedTask(sets[1:2], PromptForm(tokenizer))
    reply = lambda index, request: next(labels)  # noqa: E731
    assert run(again, model_info, tokenizer, tmp_path / "b.jsonl", reply=reply)[0]["mean"] == 1.0


def test_longbench_to_the_letter_ends_answers_at_a_token(tmp_path, tokenizer, model_info):
    """Llama 3 writes an empty line as one token, which `long-llm`'s new line as EOS does not end.

    There `eos_token_id` gets the last token of "\\n" for questions and samsum, and outputs of samsum and trec alone are
    cut to a line.
    """
    names = ["narrativeqa", "samsum", "trec", "gov_report"]
    for name in names:
        row = LONGBENCH["trec"] | {"answers": ["Ada"]} if name == "samsum" else LONGBENCH[name]
        write_lines(tmp_path / "longbench" / f"{name}.jsonl", [row])
    form = PromptForm(tokenizer)
    task = ReleasedTask(longllm.open_sets(tmp_path, "longbench", names, exact=True), form)
    plain = ReleasedTask(longllm.open_sets(tmp_path, "longbench", names), form)
    assert task.params() != plain.params()
    reply = lambda index, request: "Ada\n\nAda of"  # noqa: E731
    _, samples, asked = run(task, model_info, tokenizer, tmp_path / "a.jsonl", reply=reply)
    newline = int(tokenizer.encode("\n")[-1])
    ends = {each["subtask"]: newline in request.stop_ids for each, request in zip(samples, asked)}
    assert ends == {"narrativeqa": True, "samsum": True, "trec": False, "gov_report": False}
    scores = {each["subtask"]: each["score"] for each in samples}
    assert scores["narrativeqa"] == pytest.approx(0.5) and scores["samsum"] == pytest.approx(1.0)
    _, samples, _ = run(plain, model_info, tokenizer, tmp_path / "b.jsonl", reply=reply)
    assert [each["score"] for each in samples if each["subtask"] == "narrativeqa"] == [1.0]
    with pytest.raises(ArgumentError, match="no exact form"):
        longllm.open_sets(tmp_path, "infbench", exact=True)


def test_the_average_counts_every_set_the_same():
    """LongBench's number is the mean of 14 means; over questions, sets of 500 outweigh those of 150."""
    rows = [
        {"dataset": "longbench", "subtask": name, "score": score}
        for name, score in (("lcc", 1.0), ("trec", 0.0), ("trec", 0.0), ("trec", 0.5), ("qmsum", None))
    ] + [{"dataset": "longeval", "subtask": "topic_retrieval", "score": 1.0}]
    found = means_of_means(mean_by(rows, "dataset", "subtask"), by="dataset")
    assert found == [
        {"dataset": "longbench", "sets": 2, "without": 1, "mean": pytest.approx((1 + 0.5 / 3) / 2)}
    ]
    assert means_of_means([{"mean": None}, {"mean": None}]) == [{"sets": 0, "without": 2, "mean": None}]


def test_longbench_prompts_lose_their_middle(tmp_path, tokenizer, model_info):
    """At the published limit, and to what the model reads where that is less; the number cut is recorded."""
    row = LONGBENCH["narrativeqa"] | {"context": "ba ce di fo. " * 300}
    write_lines(tmp_path / "longbench" / "narrativeqa.jsonl", [row])
    sets = longllm.open_sets(tmp_path, "longbench", ["narrativeqa"], max_length=400)
    summary, _samples, asked = run(
        ReleasedTask(sets, PromptForm(tokenizer)), model_info, tokenizer, tmp_path / "a.jsonl"
    )
    assert summary["truncated"] == 1
    assert 395 <= len(asked[0].prompt_ids) <= 402
    assert asked[0].prompt.startswith("You are given") and asked[0].prompt.endswith("Answer:")
    sets = longllm.open_sets(tmp_path, "longbench", ["narrativeqa"])
    task = ReleasedTask(sets, PromptForm(tokenizer), max_length=500)
    assert task.plan()[0].tokens <= 500
    built = task.build(task.plan()[0])
    assert 360 <= len(built.request.prompt_ids) <= 500 - 128
    with pytest.raises(DataError, match="could not be cut"):
        small = ReleasedTask(sets, PromptForm(tokenizer), max_length=120)
        small.build(small.plan()[0])


def test_a_chat_where_the_benchmark_allows_one(tmp_path, tokenizer, model_info):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    for name in ("narrativeqa", "trec"):
        write_lines(tmp_path / "longbench" / f"{name}.jsonl", [LONGBENCH[name]])
    form = PromptForm(tokenizer, chat_template=str(template))
    task = ReleasedTask(longllm.open_sets(tmp_path, "longbench", ["narrativeqa", "trec"]), form)
    story, few_shot = (task.build(planned).request for planned in task.plan())
    assert story.prompt[0] == "[" and story.messages is not None
    assert few_shot.prompt[0] == "P" and few_shot.messages is None


INFBENCH = {
    "passkey": {"context": "12345 is it.", "input": "What is it?", "answer": ["12345"]},
    "kv_retrieval": {"context": '{"a": "b-c"}', "input": 'Key: "a"', "answer": "b-c"},
    "longbook_choice_eng": {
        "context": "Book",
        "input": "Who?",
        "answer": ["Bob"],
        "options": ["Al", "Bob", "Cy", "Di"],
    },
    "longbook_qa_chn": {"context": "Book", "input": "Who?", "answer": ["Ada Li"]},
    "longdialogue_qa_eng": {"context": "ADA: Hi", "input": "", "answer": ["ADA"]},
    "math_find": {"context": "[1, 2]", "input": "The largest number of the list is", "answer": [2]},
    "code_run": {"context": "def func_1(x)", "input": "Value of func_1(-3)?", "answer": [-7]},
    "code_debug": {"context": "def f()", "input": "", "answer": ["g"], "options": ["f", "g", "h", "i"]},
    "longbook_sum_eng": {"context": "Book", "input": "", "answer": ["Ada wins."]},
}


def test_infinitebench_as_long_llm_runs_it(tmp_path, tokenizer, model_info):
    """Every kind of answer that the release holds: texts, lists, numbers, options."""
    for name, row in INFBENCH.items():
        write_lines(tmp_path / "infbench" / f"{name}.jsonl", [{"id": 0, **row}])
    sets = longllm.open_sets(tmp_path, "infbench", list(INFBENCH))
    _summary, samples, asked = run(
        ReleasedTask(sets, PromptForm(tokenizer)), model_info, tokenizer, tmp_path / "a.jsonl"
    )
    assert {sample["subtask"]: sample["score"] for sample in samples} == dict.fromkeys(INFBENCH, 1.0)
    prompts = [request.prompt for request in asked]
    assert any("What is the largest number in the following list?\n\n[1, 2]" in text for text in prompts)
    assert any("There is a function called func_1 in" in text and "func_1(-3)" in text for text in prompts)
    assert any("\nB. Bob\n" in text for text in prompts)
    assert samples[0]["dataset"] == "infinitebench"


@pytest.mark.parametrize(
    ("name", "row", "prompt", "scores"),
    [
        (
            "longbook_choice_eng",
            {"answer": ["Bob Lee"], "options": ["Al", "Bob Lee", "Cy", "Di"]},
            "335251cb246cbcd9",
            [1.0, 0.0, 0.0, 0.5, 1.0, 0.0],
        ),
        (
            "longbook_qa_eng",
            {"answer": ["Ada the Elder", "Bob"]},
            "349a67d394d68dc1",
            [0.0, 2 / 3, 0.0, 1 / 3, 0.0, 0.0],
        ),
        (
            "longdialogue_qa_eng",
            {"context": "ADA: Hi", "input": "", "answer": ["ADA"]},
            "5f25f34201dd81de",
            [0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
        ),
    ],
)
def test_infinitebench_as_fu_2024_runs_it(name, row, prompt, scores, tmp_path, tokenizer, model_info):
    """Digests and scores are those of `create_prompt`, `process_choice` and the recall of their eval_book.py.

    It stops with an IndexError where a choice is answered by nothing, which scores 0 here.
    """
    row = {"id": 0, "context": "Book", "input": "Who?", **row}
    write_lines(tmp_path / "infbench" / f"{name}.jsonl", [row] * len(scores))
    task = ReleasedTask(longllm.open_sets(tmp_path, "fu-2024", [name]), PromptForm(tokenizer))
    replies = dict(enumerate(["B. it is", "The elder one", "a", "ADA bob", "bob lee.", ""]))
    _, samples, asked = run(
        task, model_info, tokenizer, tmp_path / "a.jsonl", reply=lambda index, request: replies[index]
    )
    assert {hashlib.sha256(each.prompt.encode()).hexdigest()[:16] for each in asked} == {prompt}
    assert {each.max_new_tokens for each in asked} == {40}
    assert [each["score"] for each in samples] == pytest.approx(scores)
    assert samples[0]["dataset"] == "infinitebench-fu-2024"


@pytest.mark.parametrize(
    ("metric", "expected", "output", "score"),
    [
        ("letter_chosen", ["Bob", "B"], "B. Bob", 1.0),
        ("letter_chosen", ["Bob", "B"], "The answer is: B", 1.0),
        ("letter_chosen", ["Bob", "B"], "I think C, not B", 0.0),
        ("letter_chosen", ["Bob", "B"], "", 0.0),
        ("letter_chosen", ["Dr. Who's", "B"], "The answer is: Dr. Who's", 1.0),
        ("letter_chosen", ["Andrew.", "C"], "Andrew", 1.0),
        ("letter_chosen", ["Andrew", "C"], "A. Bob", 0.0),
        ("function_chosen", ["get", "B"], "B.", 1.0),
        ("function_chosen", ["get", "B"], "The answer is: get", 1.0),
        ("function_chosen", ["get", "B"], "The answer is: C", 0.0),
        ("function_chosen", ["get", "B"], " B. foo", 1.0),
        ("function_chosen", ["get", "B"], "`get`", 1.0),
        ("function_chosen", ["set_option", "B"], "The answer is: `set_option`", 1.0),
        ("function_chosen", ["set_option", "B"], "The answer is: set_value", 0.0),
        ("leading_numbers", ["3", "-4", "5"], "[3, -4, 6]", 2 / 3),
        ("leading_numbers", ["3"], "", 0.0),
        ("first_decimal", ["2"], "It is 2.5", 0.0),
        ("first_decimal", ["2.5"], "2.5 is it", 1.0),
        ("first_decimal", ["-2.5"], "It is -2.5", 1.0),
        ("first_decimal", ["2"], "A range of 0-2", 0.0),
        ("last_number", ["-7"], "It returns -7.", 1.0),
        ("word_found", ["b-c"], 'The value is "b-c".', 1.0),
        ("word_found", ["b"], "b-c", 0.0),
        ("name_found", ["ADA"], "Ada, maybe", 1.0),
        ("name_found", ["DR. O'BRIEN"], "It is Dr. O'Brien.", 1.0),
        ("name_found", ["ADA STONE"], "Ada met Stone", 0.0),
        ("character_f1", ["abcd"], "ab", 2 / 3),
    ],
)
def test_infinitebench_metrics_by_eye(metric, expected, output, score):
    assert scorer_named(metric).score(expected, output) == pytest.approx(score)


def test_topics_of_the_published_sizes_are_asked(tmp_path, tokenizer, model_info):
    rows = [
        {"context": "We talk.", "question": "First?", "topics": ["the sea", "art"], "num_topics": count}
        for count in (5, 6, 10)
    ]
    write_lines(tmp_path / "longeval" / "topic_retrieval.json", rows)
    task = ReleasedTask(longllm.open_sets(tmp_path, "longeval"), PromptForm(tokenizer))
    summary, samples, asked = run(task, model_info, tokenizer, tmp_path / "a.jsonl")
    assert [sample["num_topics"] for sample in samples] == [5, 10]
    assert samples[0]["expected"] == ["the sea"] and summary["mean"] == 1.0
    assert [(row["num_topics"], row["scored"], row["mean"]) for row in summary["by_topics"]] == [
        *((5, 1, 1.0), (10, 1, 1.0)),
    ]
    assert asked[0].prompt == "We talk. First?"


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(
        DataError, match=r"longbench/qasper is not there[\s\S]*qasper.jsonl[\s\S]*--data-root"
    ):
        longllm.open_sets(tmp_path, "longbench", ["qasper"])
    with pytest.raises(ArgumentError, match="quasper"):
        longllm.open_sets(tmp_path, "longbench", ["quasper"])
    path = write_lines(tmp_path / "longbench" / "qasper.jsonl", [{"input": "a"}])
    (found,) = longllm.open_sets(tmp_path, "longbench", ["qasper"])
    with pytest.raises(DataError, match="row 1 has no field 'answers'"):
        found.question(0, chat=False)
    path.write_text('{"input": \n')
    with pytest.raises(DataError, match="row 1 is not valid JSON"):
        longllm.open_sets(tmp_path, "longbench", ["qasper"])[0].question(0, chat=False)


def test_rows_of_every_kind_of_file(tmp_path):
    """JSON lines with blank lines and without a last line break, a list, an object with data, Parquet.

    Separators of lines other than the line feed may stand in a text, and a byte order mark before the first.
    """
    rows = [{"a": 1}, {"a": "zwei \u4e8c\u2028\x85\u2029"}, {"a": [3]}]
    text = json.dumps(rows, ensure_ascii=False)
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        "\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "object.json").write_text(json.dumps({"data": rows}, indent=1))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one.json").write_text(json.dumps(rows[0]) + "\n")
    for name in ("lines.jsonl", "list.json", "object.json", "lines.json", "marked.json", "marked.jsonl"):
        found = Rows(tmp_path / name)
        assert [found[number] for number in range(len(found))] == rows == list(found), name
        assert found[-1] == rows[-1] and found[:2] == rows[:2]
    assert list(Rows(tmp_path / "one.json")) == rows[:1]
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist([{"a": 1}, {"a": 2}]), tmp_path / "t.parquet")
    assert list(find_rows(tmp_path, ["t*.parquet"], what="t")) == [{"a": 1}, {"a": 2}]
    (tmp_path / "bad.json").write_text('{"rows": [\n1]}')
    with pytest.raises(DataError, match="not a list of rows"):
        Rows(tmp_path / "bad.json")


@pytest.mark.parametrize("block", [3, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_of_a_large_list_are_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    """A list of a gigabyte was parsed whole: its rows are found by their brackets, those inside of texts left out."""
    texts = ['"', "\\", '\\"', "[{", "}],", "a, b", "\\\\\\", "\u4e2d\n", ""]
    drawn = np.random.default_rng(0)
    rows = [
        {"a": ["".join(drawn.choice(texts, size=4)) for _ in range(3)], "b": {texts[n]: [{"c": n}]}}
        for n in range(len(texts))
    ]
    path = tmp_path / "list.json"
    monkeypatch.setattr("longspan.eval.released.rows._WHOLE_BYTES", 0)
    monkeypatch.setattr("longspan.eval.released.rows._BLOCK_BYTES", block)
    for listed in (rows, rows[:1], []):
        path.write_text(json.dumps(listed, indent=indent, ensure_ascii=block == 3) + "\n")
        found = Rows(path)
        assert list(found) == listed and found._rows is None
    for broken in ('[{"a": 1}', '[{"a": 1}] [2]', '[{"a": 1}]]', '[{"a": "1}]', '[{"a": 1}] x'):
        path.write_text(broken)
        with pytest.raises(DataError, match="is not valid JSON"):
            Rows(path)
    path.write_text('[{"a": 1}, {"a": tru}]')
    with pytest.raises(DataError, match="row 2 is not valid JSON"):
        list(Rows(path))


def mmlu_row(number: int, subject: str, answer: int = 2) -> dict[str, object]:
    choices = [f"{subject} {letter}" for letter in "wxyz"]
    return {
        "query": f"Question {number}? ",
        "subject": subject,
        "choices": choices,
        "answer": answer,
        "query_id": number,
    }


def test_mmlu_from_the_released_files(tmp_path, tokenizer, model_info):
    """Records are named by query_id, not by row; a group without subjects is not a mean of nothing."""
    rows = [mmlu_row(7, "anatomy"), mmlu_row(5, "econometrics"), mmlu_row(6, "anatomy", answer=0)]
    write_lines(tmp_path / "mmlu" / "test.json", rows)
    write_lines(tmp_path / "mmlu" / "dev.json", [mmlu_row(0, "anatomy", 1), mmlu_row(1, "anatomy", 3)])
    letters = {}
    knowing = Knowing(model_info, lambda index, request: letters[request.answer_ids.tobytes()])
    form = PromptForm(tokenizer)
    for letter in "ABCD":
        letters[form.request("Answer:", answer=letter).answer_ids.tobytes()] = letter
    out = tmp_path / "mmlu.jsonl"
    summary = run_mmlu(tmp_path, knowing, form=form, label="before", out=out, num_fewshot=1)
    assert summary["by_category"] == {"Social Sciences": 1.0, "Other": 0.5, "All": 0.75}
    samples = [record for record in read_jsonl(out) if record["kind"] == "sample"]
    assert [(sample["subtask"], sample["sample"], sample["score"]) for sample in samples] == [
        ("anatomy", 7, 1.0),
        ("anatomy", 6, 0.0),
        ("econometrics", 5, 1.0),
    ]
    assert samples[0]["output"] == "C" and samples[0]["dataset"] == "mmlu"
    assert len(knowing.asked) == 12
    assert tokenizer.decode(knowing.asked[0].prompt_ids) == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Question 0?\nA. anatomy w\nB. anatomy x\nC. anatomy y\nD. anatomy z\nAnswer: B\n\n"
        "Question 7?\nA. anatomy w\nB. anatomy x\nC. anatomy y\nD. anatomy z\nAnswer:"
    )
    again = Knowing(model_info, lambda index, request: "A")
    run_mmlu(tmp_path, again, form=form, label="before", out=out, num_fewshot=1)
    assert again.asked == []
    with pytest.raises(DataError, match="mmlu's examples"):
        (tmp_path / "mmlu" / "dev.json").unlink()
        run_mmlu(tmp_path, again, form=form, label="b", out=tmp_path / "b.jsonl", num_fewshot=1)
    with pytest.raises(ArgumentError, match="no such subject"):
        run_mmlu(tmp_path, again, form=form, label="b", out=tmp_path / "b.jsonl", subjects=["law"])
    assert category_means([{"subtask": "anatomy", "mean": None}]) == {}


def helmet_task(root, category, names, tokenizer, *, length=8192, **settings):
    sets = helmet.open_sets(root, category, names, length=length, tokenizer=tokenizer)
    return ReleasedTask(sets, PromptForm(tokenizer), **settings)


def test_helmet_recall(tmp_path, tokenizer, model_info):
    """json_kv shows two pairs; RULER's prompt ends with the words that the answer continues."""
    kv = {
        "context": '{"k1": "v1"}',
        "question": "k1",
        "answer": "v1",
        "num_kvs": 105,
        "demos": [["k2", "v2"], ["k3", "v3"], ["k4", "v4"]],
    }
    write_lines(tmp_path / "json_kv" / "test_k105_dep6.jsonl", [kv])
    niah = {"context": "Text", "query": "a, b", "type_needle_v": "numbers", "answer": ["11", "22"]}
    write_lines(tmp_path / "data" / "ruler" / "niah_multivalue" / "validation_8192.jsonl", [niah])
    task = helmet_task(tmp_path, "recall", ["json_kv", "niah_multivalue"], tokenizer)
    reply = lambda index, request: " v1\nKey: k9" if "Corresponding" in request.prompt else "11 and 22"  # noqa: E731
    summary, _samples, asked = run(task, model_info, tokenizer, tmp_path / "a.jsonl", reply=reply)
    assert summary["mean"] == 1.0
    kv_prompt = next(request.prompt for request in asked if "Corresponding" in request.prompt)
    assert kv_prompt.endswith(
        "Key: k2\nCorresponding value: v2\n\nKey: k3\nCorresponding value: v3\n\nKey: k1\nCorresponding value:"
    )
    assert any(
        request.prompt.endswith("The special magic numbers for a, b mentioned in the provided text are")
        for request in asked
    )
    half = lambda index, request: "11"  # noqa: E731
    task = helmet_task(tmp_path, "recall", ["niah_multivalue"], tokenizer)
    assert run(task, model_info, tokenizer, tmp_path / "b.jsonl", reply=half)[0]["mean"] == 0.5
    with pytest.raises(DataError, match="niah_multikey_2 is not there"):
        helmet.open_sets(tmp_path, "recall", length=8192, tokenizer=tokenizer)
    with pytest.raises(ArgumentError, match="input length"):
        helmet.open_sets(tmp_path, "recall", length=10_000, tokenizer=tokenizer)


def test_helmet_rag(tmp_path, tokenizer, model_info):
    """All depths of a drawn question are asked; its examples are other questions, the same ones every time."""

    def row(number, depth=0):
        passages = [{"title": f"T{number}", "text": f"text {number} {depth}"}]
        return {"question": f"q{number}", "answers": [f"The a{number}", "x"], "ctxs": passages}

    write_lines(
        tmp_path / "kilt" / "nq-dev-multikilt_1000_k50_dep6.jsonl",
        [row(number, depth) for number in range(3) for depth in range(2)],
    )
    write_lines(
        tmp_path / "kilt" / "nq-train-multikilt_1000_k3_dep6.jsonl", [row(10 + n // 2) for n in range(8)]
    )
    task = helmet_task(tmp_path, "rag", ["nq"], tokenizer)
    assert len(task.plan()) == 6
    reply = lambda index, request: f" {'a' + request.prompt[-9]}.\nQuestion: and?\nAnswer: no"  # noqa: E731
    summary, _samples, asked = run(task, model_info, tokenizer, tmp_path / "a.jsonl", reply=reply)
    assert summary["mean"] == 1.0
    by_question = {}
    for request in asked:
        head, _, question = request.prompt.rpartition("\n\nQuestion: ")
        by_question.setdefault(question, []).append(head)
        assert len(re.findall(r"Title: T1\d\)", head)) == 2 and "Answer: The a1" in head
    assert len(by_question) == 3
    for first, second in by_question.values():
        assert first.rpartition("\n\nDocument")[0] == second.rpartition("\n\nDocument")[0]


def test_helmet_icl(tmp_path, tokenizer, model_info):
    """Labels are renamed for each question, so a model cannot know them but from the examples."""
    train = [{"text": f"train {n}", "coarse_label": n % 6, "fine_label": n % 50} for n in range(120)]
    write_lines(tmp_path / "trec" / "train.jsonl", train)
    test = [{"text": f"test {n}", "coarse_label": n % 6, "fine_label": 0} for n in range(4)]
    write_lines(tmp_path / "trec" / "test.jsonl", test)
    task = helmet_task(tmp_path, "icl", ["trec_coarse"], tokenizer)
    built = [task.build(planned) for planned in task.plan()]
    prompt = built[0].request.prompt
    assert prompt.startswith("Use the provided mapping") and prompt.endswith("test 0\nlabel:")
    assert '"label: {label}"' in prompt
    assert prompt.count("\nlabel: ") == 400
    names = {
        line.split("\n")[0]: line.split("label: ")[1]
        for line in prompt.split("\n\n")
        if line.startswith("train ")
    }
    assert {names[f"train {n}"] for n in range(120) if n % 6 == 0 and f"train {n}" in names} == set(
        built[0].expected
    )
    assert task.build(task.plan()[0]).request.prompt == prompt
    summary, samples, _asked = run(task, model_info, tokenizer, tmp_path / "a.jsonl")
    assert summary["mean"] == 1.0 and samples[0]["metric"] == "helmet_label_match"


def test_helmet_long_qa(tmp_path, tokenizer, model_info):
    """A context that is too long loses its end and says so; the question stays."""
    rows = [
        {
            "id": n,
            "context": f"Book {n}. " + "ba ce di fo. " * 4000,
            "input": f"Who {n}?",
            "answer": [f"Name{n}"],
            "options": [f"Name{n}", "Al", "Bo", "Cy"],
        }
        for n in range(3)
    ]
    for name in ("longbook_qa_eng", "longbook_choice_eng"):
        write_lines(tmp_path / "infinitebench" / f"{name}.jsonl", rows)
    task = helmet_task(tmp_path, "longqa", ["infbench_qa", "infbench_choice"], tokenizer, limit=1)
    summary, _samples, asked = run(task, model_info, tokenizer, tmp_path / "a.jsonl")
    assert summary["mean"] == 1.0 and summary["truncated"] == 2
    for request in asked:
        assert 8100 <= len(request.prompt_ids) <= 8192 - 10
        assert " ... [the rest of the text is omitted]\n\nQuestion: Who" in request.prompt
        assert request.prompt.count("[story text]") == 2
        assert request.prompt.endswith("\n\nAnswer:")


def test_helmet_re_ranking(tmp_path, tokenizer, model_info):
    """A ranking is scored by the labels of its first ten passages; what is shown are other questions than the asked."""

    def row(number, passages):
        texts = [{"id": str(10 * number + n), "text": f"text {n}", "label": n % 3} for n in range(passages)]
        return {"qid": f"q{number}", "query": f"query {number}", "ctxs": texts}

    write_lines(tmp_path / "msmarco/test_reranking_data_k50_dep3.jsonl", [row(n, 6) for n in range(3)])
    write_lines(tmp_path / "msmarco/test_reranking_data_k10_dep3.jsonl", [row(n, 3) for n in (*range(3), 7)])
    task = helmet_task(tmp_path, "rerank", (), tokenizer)
    first = task.build(task.plan()[0])
    assert first.expected == ["2 > 5 > 1 > 4 > 0 > 3"] and first.fields["relevant"] == {
        "1": 1,
        "2": 2,
        "4": 1,
        "5": 2,
    }
    prompt = first.request.prompt
    assert prompt.count("\nRanking: ") == 3 and prompt.endswith(
        "[ID: 5] Document: text 5\n\nQuery: query 0\nRanking:"
    )
    assert prompt.count("Query: query 0") == 1
    score = scorer_named("helmet_ndcg_10").score
    assert score(first.expected, "Ranking: [ID2] > ID: 5 > 1 > 4", first.fields) == pytest.approx(1.0)
    gains = [1, 0, 2, 1, 2]  # of 1 > 0 > 2 > 4 > 5, by hand
    ideal = 2 + 2 / np.log2(3) + 1 / 2 + 1 / np.log2(5)
    found = sum(gain / np.log2(place + 2) for place, gain in enumerate(gains))
    assert score(first.expected, "7. So: 1 > 0 > 2 > 4 > 1 > 5 > 99", first.fields) == pytest.approx(
        found / ideal
    )
    assert score(first.expected, "none", first.fields) == 0.0


def test_helmet_summaries(tmp_path, tokenizer, model_info, monkeypatch):
    """A book's own summary among the examples, or a lawsuit without one, would be another question than HELMET's."""
    book = {"input": "", "options": []}
    books = [{**book, "id": n, "context": f"Book {n}. " * 9, "answer": [f" sum {n} "]} for n in range(4)]
    write_lines(tmp_path / "infinitebench/longbook_sum_eng.jsonl", books)
    suits = [
        {"sources": ["Ada sued. ", "Bob paid. "], "summary/short": short}
        for short in ("A case.", None, "B case.")
    ]
    write_lines(tmp_path / "multi_lexsum/validation.jsonl", suits)
    write_lines(tmp_path / "multi_lexsum/train.jsonl", suits)
    monkeypatch.setattr(helmet, "_LONG", 3)
    task = helmet_task(tmp_path, "summ", (), tokenizer)
    built = {p.key[1:]: task.build(p) for p in task.plan()}
    assert [key[0] for key in built] == ["infbench_sum"] * 4 + ["multi_lexsum"] * 2
    for (name, _), each in built.items():
        shown = each.request.prompt
        assert shown.count("Summary:") == 3
        assert name == "multi_lexsum" or each.expected[0].strip() not in shown.split("Now")[0]
    last = built["multi_lexsum", 0].request.prompt
    assert "Legal documents:\nAda sued. \n\nBob paid. \n\nNow please summarize the case.\n\nSummary:" in last


def test_helmet_metrics_by_eye():
    """Without the label of the prompt, a later "Answer:" of an output that goes on would be taken."""
    fields = {"label": "Answer:", "label_in_prompt": "Answer:"}
    goes_on = " Paris\n\nQuestion: Where?\nAnswer: Rome"
    assert scorer_named("helmet_exact_match").score(["paris!"], goes_on, fields) == 1.0
    assert scorer_named("helmet_exact_match").score(["Rome"], goes_on, fields) == 0.0
    assert scorer_named("helmet_exact_match").score(["Rome"], "It is so.\nAnswer: Answer: Rome", {}) == 1.0
    assert scorer_named("helmet_substring_exact_match").score(["the Rome"], goes_on, fields) == 1.0
    assert scorer_named("helmet_f1").score(["yes"], "yes it is") == 0.0
    assert scorer_named("helmet_f1").score(["a red car"], "Answer: red bus") == pytest.approx(0.5)
    assert scorer_named("helmet_choice").score(["B", "B. Bath"], "It was b. bath", {}) == 1.0
    assert scorer_named("helmet_choice").score(["B", "B. Bath"], "A", {}) == 0.0
    assert scorer_named("helmet_rouge_l").score(["running dogs"], "run dog") == 1.0


def test_orders_are_those_of_the_datasets_library():
    """Published questions and examples are drawn by it; the numbers are from `datasets` 5.2.0."""
    assert helmet.shuffled(6, 42) == [3, 2, 5, 4, 1, 0]
    assert helmet.seed_of("abc") == 0x_F20015AD % 2**31
