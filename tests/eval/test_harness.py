"""lm-eval's tasks on what answers here: the same numbers as lm-eval's own model, and records that resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longspan.core.errors import ArgumentError, DataError, MissingDependencyError
from longspan.eval.prompts import PromptForm
from longspan.eval.truncation import cut_end, cut_middle
from longspan.infer.local import LocalAnswerer
from longspan.infer.plain import PlainAnswerer
from longspan.infer.requests import Answer
from tests.eval.conftest import make_text
from tests.patience import PATIENCE_SECONDS

needs_lm_eval = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install 'longspan[harness]'",
)
ALLOW = pytest.mark.filterwarnings("ignore")  # those of lm-eval and what it imports are not ours

CHOICE_TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["ba ce", "difo", "gu"]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ANSWER_TASK = """\
task: local_answer
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{word}}}}"
generation_kwargs: {{until: ["ka"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


ONE = {"max_gen_toks": 1, "do_sample": False}


@pytest.fixture
def local_tasks(tmp_path: Path) -> Path:
    """Two tasks of four questions each on a local file."""
    rows = [{"text": make_text(seed, 3)[:60], "answer": seed % 3, "word": f"word{seed}"} for seed in range(4)]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(CHOICE_TASK.format(folder=tmp_path))
    (tmp_path / "answer.yaml").write_text(ANSWER_TASK.format(folder=tmp_path))
    return tmp_path


@pytest.fixture(params=[LocalAnswerer, PlainAnswerer])
def answerer(request, model, tokenizer, model_info):
    """What reads shared prefixes once, and what reads every prompt from its first token."""
    return request.param(model, tokenizer, identity=model_info | {"trained_length": None}, batch_tokens=4096)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def hf_lm(model, tokenizer):
    """lm-eval's own model around the same weights."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path))
    for name, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if number is not None:
            setattr(fast, name, tokenizer.decode([number]))
    fast.pad_token = fast.eos_token
    model.generation_config.eos_token_id = tokenizer.eos_id  # a new Llama's is 2, whatever the tokenizer
    return HFLM(pretrained=model, tokenizer=fast, batch_size=1, max_length=256, add_bos_token=False)


def plain(text: str) -> str:
    """Return a text without special tokens: a trained model writes none but those that end an answer."""
    return text.replace("<|pad|>", "")


class Counting:
    """An answerer that counts what it is asked, and stops after `most` answers."""

    def __init__(self, answerer, most: int = 10**9) -> None:
        self.inner, self.most, self.asked, self.calls = answerer, most, 0, []

    identity = property(lambda self: self.inner.identity)
    max_length = property(lambda self: self.inner.max_length)

    def score(self, requests):
        return self._count(self.inner.score, requests)

    def generate(self, requests):
        return self._count(self.inner.generate, requests)

    def _count(self, ask, requests):
        self.calls.append(len(requests))
        for pair in ask(requests):
            if self.asked == self.most:
                raise KeyboardInterrupt
            self.asked += 1
            yield pair

    def close(self) -> None:
        pass


def instances(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@needs_lm_eval
@ALLOW
def test_likelihoods_and_answers_equal_those_of_lm_evals_own_model(model, tokenizer, answerer):
    """A continuation cut at the wrong token, or a lost first token, would change every multiple choice."""
    from longspan.eval.harness_lm import HarnessLM

    theirs = hf_lm(model, tokenizer)
    ours = HarnessLM(answerer, PromptForm(tokenizer), max_length=257)
    texts = [make_text(seed, 6) for seed in range(3)]
    pairs = [(texts[0], " ba ce"), (f"{texts[1]} ", "difo"), (texts[2], "gu"), ("", texts[0][:40])]
    wanted = theirs.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    found = ours.loglikelihood(instances("loglikelihood", *pairs))
    np.testing.assert_allclose([each[0] for each in found], [each[0] for each in wanted], atol=1e-4)
    assert [each[1] for each in found] == [each[1] for each in wanted]
    more = [make_text(seed, 2).rstrip() for seed in range(40)]
    firsts = [(text, ours.generate_until(instances("generate_until", (text, ONE)))[0]) for text in more]
    # Some of these tokens are no whole character, and their text is tokenised in another way.
    assert any(greedy for _, greedy in ours.loglikelihood(instances("loglikelihood", *firsts)))

    long = "".join(make_text(seed, 40) for seed in range(3))
    assert len(tokenizer.encode(long)) > 600
    rolling = [(texts[0],), (long,)]
    wanted = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", *rolling), disable_tqdm=True)
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", *rolling))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)

    asked = [(text, {"until": ["ka"], "max_gen_toks": 12, "do_sample": False}) for text in texts]
    wanted = theirs.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    found = ours.generate_until(instances("generate_until", *asked))
    assert [plain(text) for text in found] == wanted


@needs_lm_eval
@ALLOW
def test_scores_equal_lm_evals_own_evaluation(model, tokenizer, answerer, local_tasks, tmp_path, offline):
    import lm_eval

    from longspan.eval.harness import run_harness
    from longspan.eval.harness_data import load_tasks

    names = ["local_choice", "local_answer"]
    tasks = load_tasks(names, data_root=None, include_path=local_tasks)
    wanted = lm_eval.evaluate(hf_lm(model, tokenizer), {"tasks": dict(tasks)}, bootstrap_iters=0)
    tasks = load_tasks(names, data_root=None, include_path=local_tasks)
    summary = run_harness(
        tasks, answerer, form=PromptForm(tokenizer), label="before", out=tmp_path / "harness.jsonl"
    )
    means = {row["dataset"]: row["mean"] for row in summary["by_dataset"]}
    assert means["local_choice"] == wanted["results"]["local_choice"]["acc,none"]
    lines = (tmp_path / "harness.jsonl").read_text().splitlines()[1:-1]
    # Answers are recorded as they come.
    samples = sorted(map(json.loads, lines), key=lambda sample: (sample["metric"], sample["sample"]))
    theirs = [sample["filtered_resps"][0] for sample in wanted["samples"]["local_answer"]]
    found = [sample["output"] for sample in samples if sample["dataset"] == "local_answer"]
    assert [plain(text) for text in found] == theirs
    assert (
        samples[0]
        | {
            "kind": "sample",
            "dataset": "local_choice",
            "subtask": "",
            "metric": "acc",
            "sample": 0,
            "expected": "ba ce",
            "truncated": 0,
        }
        == samples[0]
    )
    assert samples[0]["metrics"] == {"acc": samples[0]["score"]}


@needs_lm_eval
@ALLOW
def test_a_killed_run_asks_for_nothing_twice(tokenizer, answerer, local_tasks, tmp_path, offline):
    """Records are per question: three choices are one question, and half a question is asked again."""
    from longspan.eval.harness import run_harness
    from longspan.eval.harness_data import load_tasks

    def run(asked):
        tasks = load_tasks(["local_choice"], data_root=None, include_path=local_tasks)
        return run_harness(
            tasks, asked, form=PromptForm(tokenizer), label="before", out=tmp_path / "harness.jsonl"
        )

    killed = Counting(answerer, most=7)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert killed.calls == [12]  # all choices of all questions are one list, so that prefixes are shared
    second = Counting(answerer)
    assert run(second)["samples"] == 4
    assert second.asked == 12 - 6
    third = Counting(answerer)
    assert run(third)["scored"] == 4
    assert third.asked == 0


@needs_lm_eval
@ALLOW
def test_a_context_that_is_too_long_loses_its_middle(tokenizer, answerer, tmp_path):
    """lm-eval's own models drop the beginning, where LongBench's instructions stand."""
    from longspan.eval.harness_lm import HarnessLM

    ours = HarnessLM(answerer, PromptForm(tokenizer), max_length=60)
    text = f"Begin here. {make_text(1, 60)} End here."
    asked = ours.ask_generation(text, {"max_gen_toks": 10})
    prompt = asked.requests[0].prompt
    assert prompt.startswith("Begin here.") and prompt.endswith("End here.")
    assert 40 <= len(asked.requests[0].prompt_ids) <= 50
    assert asked.truncated > 100
    likely = ours.ask_likelihood(text, " ba ce")
    assert len(likely.requests[0].prompt_ids) + len(likely.requests[0].answer_ids) <= 60
    with pytest.raises(ArgumentError, match="no room"):
        HarnessLM(answerer, PromptForm(tokenizer), max_length=8).ask_generation(text, {"max_gen_toks": 7})
    with pytest.raises(ArgumentError, match="greedily"):
        ours.ask_generation("a", {"do_sample": True, "temperature": 0.7})


@needs_lm_eval
@ALLOW
def test_benchmarks_are_read_from_a_local_folder(tokenizer, answerer, tmp_path, offline):
    """The few-shot examples of a subject are one prefix; a missing file is named, and nothing is fetched."""
    from longspan.eval.harness import run_harness
    from longspan.eval.harness_data import load_tasks

    folder = tmp_path / "MMLU" / "anatomy"
    folder.mkdir(parents=True)
    rows = [
        {"question": f"Which one is {each}?", "choices": ["ba", "ce", "di", "fo"], "answer": each}
        for each in range(4)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"mmlu_anatomy.*\n.*split dev[\s\S]*anatomy.jsonl"):
        load_tasks(["mmlu_anatomy"], data_root=tmp_path, num_fewshot=2)
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows[:2]), folder / "dev-00000-of-00001.parquet")
    tasks = load_tasks(["mmlu_anatomy"], data_root=tmp_path, num_fewshot=2)
    summary = run_harness(
        tasks, answerer, form=PromptForm(tokenizer), label="before", out=tmp_path / "mmlu.jsonl"
    )
    assert summary["by_subtask"][0]["dataset"] == "mmlu"
    assert summary["by_subtask"][0]["subtask"] == "anatomy"
    header = json.loads((tmp_path / "mmlu.jsonl").read_text().splitlines()[0])
    assert header["params"]["tasks"] == {"mmlu_anatomy": {"version": "1.0", "num_fewshot": 2}}
    with pytest.raises(DataError, match="mmlu_abstract_algebra is not there"):
        load_tasks(["mmlu"], data_root=tmp_path)
    with pytest.raises(ArgumentError, match="no such task"):
        load_tasks(["mmlu_anatomie"], data_root=tmp_path)


@needs_lm_eval
@ALLOW
def test_mmlu_s_answers_are_told_apart_by_their_texts_too(tokenizer, answerer, tmp_path, offline):
    """Small models are at chance where the answer is a letter; lm-eval has the same questions with whole answers, its
    groups nested and the form behind the subject's name."""
    import lm_eval.tasks

    from longspan.eval.harness import run_harness
    from longspan.eval.harness_data import load_tasks

    files = (Path(lm_eval.tasks.__file__).parent / "mmlu" / "continuation").glob("mmlu_*.yaml")
    subjects = [file.stem.removeprefix("mmlu_") for file in files]
    assert len(subjects) == 57
    for subject in subjects:
        folder = tmp_path / "mmlu" / subject
        folder.mkdir(parents=True)
        row = {"question": f"What is {subject}?", "choices": ["ba", "ce", "di", "fo"], "answer": 2}
        (folder / "test.jsonl").write_text(json.dumps(row) + "\n")
    tasks = load_tasks(["mmlu_continuation"], data_root=tmp_path)
    assert sorted(tasks) == sorted(f"mmlu_{subject}_continuation" for subject in subjects)
    anatomy = load_tasks(["mmlu_anatomy_continuation"], data_root=tmp_path)
    summary = run_harness(
        anatomy, answerer, form=PromptForm(tokenizer), label="before", out=tmp_path / "r.jsonl"
    )
    (found,) = summary["by_subtask"]
    assert (found["dataset"], found["subtask"]) == ("mmlu_continuation", "anatomy")
    record = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[1])
    assert record["expected"] == "di" and record["output"] in ("ba", "ce", "di", "fo")


@needs_lm_eval
@ALLOW
def test_infinitebench_and_babilong_are_read_as_released(tmp_path, offline):
    """InfiniteBench's answers are texts here and lists there; BABILong names its configuration by a length."""
    from longspan.eval.harness_data import load_tasks

    bench = tmp_path / "InfiniteBench"
    bench.mkdir()
    rows = [
        {"id": 0, "context": "a b", "input": "What?", "answer": "12345", "options": []},
        {"id": 1, "context": "a b", "input": "What?", "answer": ["54321"], "options": []},
    ]
    (bench / "passkey.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_tasks(["infinitebench_passkey"], data_root=tmp_path)["infinitebench_passkey"]
    assert [doc["answer"] for doc in task.eval_docs] == [["12345"], ["54321"]]
    assert task.process_results(task.eval_docs[0], ["It is 12345."]) == {"score": 1.0}
    folder = tmp_path / "babilong-1k-samples" / "data" / "4k"
    folder.mkdir(parents=True)
    row = {"input": "Mary went home.", "question": "Where is Mary? ", "target": "home"}
    (folder / "qa1.json").write_text(json.dumps([row]))
    task = load_tasks(["babilong_qa1"], data_root=tmp_path, max_seq_lengths="4k")["babilong_qa1"]
    assert task.process_results(task.eval_docs[0], ["At Home"]) == {"acc": 1.0}


@needs_lm_eval
@ALLOW
def test_longbench_is_read_as_released(tmp_path, offline):
    """Version 1 has a file for each set, also in a folder data/, with other fields than lm-eval's copy; version 2 a
    folder for each."""
    for name in ("jieba", "rouge", "fuzzywuzzy"):
        pytest.importorskip(name, reason=f"lm-eval's LongBench needs {name}: pip install 'longspan[harness]'")
    from longspan.eval.harness_data import load_tasks

    rows = [{"context": "Ada wrote it.", "input": "Who?", "answers": ["Ada"]}]
    folder = tmp_path / "longbench" / "data"
    folder.mkdir(parents=True)
    (folder / "qasper.jsonl").write_text(json.dumps(rows[0]) + "\n")
    task = load_tasks(["longbench_qasper"], data_root=tmp_path)["longbench_qasper"]
    assert task.process_results(task.eval_docs[0], [" Ada."])["qa_f1_score"] == 1.0
    assert "Article: Ada wrote it." in task.doc_to_text(task.eval_docs[0])
    assert "Question: Who?" in task.doc_to_text(task.eval_docs[0])  # `input` in the release
    row = {"context": "A table.", "question": "Which?", "choices": list("wxyz"), "answer": "B"}
    folder = tmp_path / "longbench-v2" / "table_qa"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    task = load_tasks(["longbench2_table"], data_root=tmp_path)["longbench2_table"]
    assert task.doc_to_choice(task.eval_docs[0]) == ["A", "B", "C", "D"]
    with pytest.raises(DataError, match="longbench_lcc is not there"):
        load_tasks(["longbench"], data_root=tmp_path)


@pytest.mark.slow
@needs_lm_eval
def test_without_network_and_data_there_is_one_message(tmp_path):
    """No traceback, no waiting for a hub that is not there."""
    code = (
        "from longspan.eval.harness_data import load_tasks\n"
        "try:\n    load_tasks(['mmlu_anatomy'], data_root=None)\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=settings
    )
    assert done.stdout.startswith("DataError the data of mmlu_anatomy could not be loaded"), done.stderr
    assert "--data-root" in done.stdout


@needs_lm_eval
@ALLOW
def test_some_longbench_tasks_are_never_a_chat():
    from longspan.eval.harness_data import family_of, takes_chat_template

    assert not takes_chat_template("longbench_trec")
    assert not takes_chat_template("longbench_repobench-p_e")
    assert takes_chat_template("longbench_qasper_e")
    assert takes_chat_template("mmlu_anatomy")
    assert family_of("longbench2_table") == ("longbench2", "table")
    assert family_of("mmlu_anatomy_continuation") == ("mmlu_continuation", "anatomy")
    assert family_of("mmlu_continuation") == ("mmlu_continuation", "")


@needs_lm_eval
@ALLOW
def test_a_chat_is_asked_by_the_template(tokenizer, answerer, tmp_path):
    """A server that chats gets the message, a local model the template's ids; neither gets both."""
    from longspan.eval.harness_lm import HarnessLM

    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    ours = HarnessLM(answerer, PromptForm(tokenizer, chat_template=str(template)))
    text = ours.apply_chat_template([{"role": "user", "content": "ba ce"}])
    assert text == "[ba ce]"
    (request,) = ours.ask_likelihood(text, "di").requests
    assert request.messages == [{"role": "user", "content": "ba ce"}]
    assert tokenizer.decode(request.prompt_ids) == "[ba ce]"
    assert tokenizer.decode(request.answer_ids) == "di"
    with pytest.raises(ArgumentError, match="one message"):
        ours.apply_chat_template([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])


def test_truncation_goldens(tokenizer):
    """Head and tail of the text itself: decoding halves would change spaces, and lose special tokens."""
    text = "one two three four five six seven eight nine ten."
    ids = tokenizer.encode(text)
    whole = cut_middle(text, tokenizer, len(ids))
    assert whole == (text, 0)
    cut = cut_middle(text, tokenizer, 10)
    head, tail = tokenizer.decode(ids[:5]), tokenizer.decode(ids[-5:])
    assert cut.text.startswith(head.rstrip()) and cut.text.endswith(tail.lstrip())
    assert cut.removed == len(ids) - 10
    assert cut_middle(text, tokenizer, 11).removed == len(ids) - 10  # two halves of the same length
    end = cut_end(text, tokenizer, 4)
    assert text.startswith(end.text) and end.removed == 4
    assert cut_end(text, tokenizer, 10**6).text == ""
    with pytest.raises(ArgumentError):
        cut_middle(text, tokenizer, 1)


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch, tokenizer, answerer, tmp_path):
    from longspan.eval.harness import run_harness

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"longspan\[harness\]"):
        run_harness({}, answerer, form=PromptForm(tokenizer), label="a", out=tmp_path / "a.jsonl")


def test_the_bridge_is_imported_only_when_asked_for():
    """lm-eval takes seconds to import."""
    code = "import longspan.eval.harness, sys; print('lm_eval' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout.strip() == "False", done.stderr


def test_an_answer_with_an_error_leaves_its_question_unscored(tmp_path, tokenizer, model_info):
    """A question of which one choice could not be measured has no likeliest choice; it is not wrong."""
    from longspan.eval.compound import Compound, Judged, PlannedCompound, run_compounds
    from longspan.eval.records import make_header
    from longspan.infer.requests import Request

    class Half:
        identity, max_length = model_info, None

        def score(self, requests):
            yield 1, Answer("", error="too long")
            yield 0, Answer("a", nll=np.array([0.5]))

    header = make_header("harness", "a", model_info=model_info, tokenizer="t", seed=0, params={})
    compound = Compound(
        "score", [Request("a"), Request("b")], "a", lambda answers: Judged("a", 1.0), {"truncated": 0}
    )
    planned = [PlannedCompound("id", 2, {"dataset": "d", "sample": 0}, lambda: compound)]
    summary, records = run_compounds(planned, Half(), header=header, out=tmp_path / "a.jsonl")
    assert summary["unscored"] == {"too long": 1}
    assert records[0]["score"] is None
