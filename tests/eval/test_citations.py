"""HELMET's citation tasks: prompts of the released files, scores of what is said and of what is cited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nltk
import pytest
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from longspan.cli.main import app
from longspan.core.errors import ArgumentError, ConfigError, DataError, RunError
from longspan.core.records import read_jsonl
from longspan.data.tokenizer import Tokenizer
from longspan.eval import metrics_alce
from longspan.eval.citations import NotNowError, citation_scores, judge_cited, open_cited, server_judge
from longspan.eval.metrics import rouge_l_sum
from longspan.eval.prompts import PromptForm
from longspan.eval.released import helmet
from longspan.eval.released.sets import ReleasedTask
from longspan.eval.rescoring import RescoreConfig
from longspan.eval.runner import run_task
from longspan.eval.scorers import scorer_named
from longspan.infer.entailment import EntailmentModel
from tests.api.fake_server import chat, serving
from tests.eval.answerers import Knowing
from tests.eval.test_judge import client_of

PROMPT = {
    "instruction": "Cite.",
    "demo_prompt": "{instruction}\n\nQ: {question}\n\n{context}\n\nAnswer: {answer}",
    "doc_prompt": "[{ID}]({title}): {text}",
    "demos": [
        {"question": f"Who {n}?", "answer": f"Ada [{n}].", "docs": [{"title": "t", "text": f"d{n}"}]}
        for n in range(4)
    ],
}
PASSAGES = [{"id": str(n), "title": f"T{n}", "text": f"ada wrote {n}", "score": 1.0} for n in range(1, 5)]
ASQA = {
    "question": "Who wrote?",
    "docs": PASSAGES,
    "qa_pairs": [{"short_answers": ["Ada", "A. L."]}, {"short_answers": ["1843"]}],
    "annotations": [{"long_answer": "Ada wrote."}, {"long_answer": "She wrote in 1843."}],
}
QAMPARI = {"question": "Which?", "docs": PASSAGES, "answers": [["Oslo"], ["Rome", "Roma"], ["Bern"]]}


@pytest.fixture(autouse=True)
def _punkt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in of NLTK's data: the files of punkt_tab, which know of no abbreviation but one."""
    folder = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (folder / name).write_text("")
    (folder / "abbrev_types.txt").write_text("dr\n")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    metrics_alce.splitter.cache_clear()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_released(tmp_path)


def write_released(folder: Path) -> Path:
    """Write HELMET's data and prompts into a folder; return that of the data."""
    for name, row in (("asqa", ASQA), ("qampari", QAMPARI)):
        for place, file, content in (
            ("data/alce", f"{name}_eval_gtr_top2000.json", [row]),
            ("prompts", f"{name}_revised.json", PROMPT),
        ):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / file).write_text(json.dumps(content))
    return folder / "data"


def asked(root: Path, tokenizer: Tokenizer, out: Path, replies: dict[str, str]) -> dict[str, Any]:
    task = ReleasedTask(
        helmet.open_sets(root, "cite", list(replies), length=8192, tokenizer=tokenizer), PromptForm(tokenizer)
    )
    knows = {task.build(each).request.prompt: replies[str(each.key[1])] for each in task.plan()}
    answerer = Knowing(tokenizer, knows=knows.__getitem__)
    return run_task(task, answerer, tokenizer=tokenizer, label="m", out=out)


def judge(pairs: Any) -> list[bool | None]:
    """Find a claim right where the premise holds its last word; say nothing of one that ends in "hm"."""
    words = [(premise.lower(), claim.lower().rstrip(" .").split()[-1]) for premise, claim in pairs]
    return [None if word == "hm" else word in premise for premise, word in words]


def test_questions_and_what_is_said(root: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Examples are drawn row by row as published, passages are numbered from 1; a part has several forms."""
    one = helmet.open_sets(root, "cite", ["asqa"], length=8192, tokenizer=tokenizer)[0]
    question = one.question(0, chat=False)
    prompt = question.template.format_map(dict(question.values))
    # random.Random(42).sample of four examples: the first and the last.
    assert prompt == (
        "Cite.\n\nQ: Who 0?\n\n[1](t): d0\n\nAnswer: Ada [0].\n\n\nCite.\n\nQ: Who 3?\n\n[1](t): d3\n\n"
        "Answer: Ada [3].\n\n\nCite.\n\nQuestion: Who wrote?\n\n"
        + "\n\n".join(f"[{n}](T{n}): ada wrote {n}" for n in range(1, 5))
        + "\n\nAnswer:"
    )
    summary = asked(
        root, tokenizer, tmp_path / "a.jsonl", {"asqa": " Ada [1].", "qampari": " Oslo [1], Rome [2]."}
    )
    means = {row["subtask"]: row["mean"] for row in summary["by_subtask"]}
    # As published, what a prompt ends with belongs to the answer: "Answer: Oslo" is no name.
    assert means == {"asqa": 0.5, "qampari": pytest.approx(1 / 3)}
    released = root.parent / "prompts/asqa_revised.json"
    for text, found in (
        ("[]", "no instruction, demo_prompt, doc_prompt, demos"),
        ('{"demos": [{}]}', "no instr"),
    ):
        released.write_text(text)
        with pytest.raises(DataError, match=f"is no prompt of HELMET\n  found: {found}"):
            helmet.open_sets(root, "cite", length=8192, tokenizer=tokenizer)
    released.unlink()
    with pytest.raises(DataError, match="prompt of helmet_cite/asqa is not there"):
        helmet.open_sets(root, "cite", length=8192, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "output", "score"),
    [
        ("helmet_str_em", "The ada[1] of\n1843", 1.0),
        ("helmet_str_em", "a.l.", 0.5),
        ("helmet_str_hit", "Ada", 0.0),
        ("helmet_precision", "Ada [1], Bob, 1843.", 2 / 3),
        ("helmet_recall", "1843, L [2]", 1.0),
        ("helmet_recall_top5", "Bob", 0.0),
        ("helmet_list_f1", "Ada, Bob", 0.5),
        ("helmet_list_f1_top5", "", 0.0),
    ],
)
def test_what_is_said(name: str, output: str, score: float) -> None:
    """Citations, punctuation and the end of a list are no part of an answer."""
    fields = {"alternatives": [["Ada", "A. L."], ["1843"]]}
    assert scorer_named(name).score("x", output, fields) == pytest.approx(score)
    with pytest.raises(ArgumentError, match="alternatives"):
        scorer_named(name).score("x", output)


def test_rouge_by_sentences_is_that_of_rouge_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are matched by the union of their subsequences; words of one line do not count twice."""
    texts = [
        "the cat sat\non the mats sat\n\nit was",
        "on a mat the cats were sitting\nthe cat sat on it",
        "sat\nsat cat the\nmats",
        "",
    ]
    released = RougeScorer(["rougeLsum"], use_stemmer=True)
    for one in texts:
        for two in texts:
            expected = released.score(one, two)["rougeLsum"].fmeasure
            assert rouge_l_sum(one, two, stemmed=True) == pytest.approx(expected)
    rule = scorer_named("helmet_rouge_l_sum")
    expected = released.score("dr. ada wrote.\nshe sang.", "dr. ada wrote.\nshe left.")["rougeLsum"].fmeasure
    assert rule.score("Dr. Ada wrote. She sang.", "Dr. Ada wrote [1]. She left.") == pytest.approx(expected)
    monkeypatch.setattr(nltk.data, "path", [])
    metrics_alce.splitter.cache_clear()
    with pytest.raises(DataError, match=r"nltk\.downloader punkt_tab"):
        rule.score("Ada.", "Ada.")


def test_citations_are_counted_as_published() -> None:
    """Passages that do not exist, that add nothing, that are needed together; the fourth of a sentence is not read."""
    passages = [{"title": word, "text": ""} for word in "abcd"]
    wanted = {"x": ({"a", "b"},), "y": ({"a"}, {"b"})}  # claims and the sets of passages each follows from

    def follows(pairs: Any) -> list[bool]:
        shown = [
            ({line[7:] for line in premise.split("\n") if line[:6] == "Title:"}, claim)
            for premise, claim in pairs
        ]
        return [any(each <= titles for each in wanted.get(claim, ())) for titles, claim in shown]

    def found(*texts: str) -> tuple[float | None, float | None]:
        scores = citation_scores(texts, passages, follows)
        return scores.recall, scores.precision

    assert found("x [1][2]") == (1.0, 1.0)  # neither alone, both together
    assert found("x [1][2][3]") == (1.0, pytest.approx(2 / 3))  # c is not needed
    assert found("y [1][3][4][2]") == (1.0, pytest.approx(1 / 3))
    assert found("x [3][4][1][2]") == (0.0, 0.0)
    assert found("y [1]", "x [1]", "y", "y [1][9]") == (0.25, 0.5)
    assert found("y") == (0.0, 0.0)
    assert found() == (None, None)


def test_a_judge_scores_what_is_recorded(root: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The score is the mean of three; what was not judged has none and is counted; other files are refused."""
    records, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    replies = {"asqa": " Ada wrote 1 [1]. Yes, hm [2]. 1843", "qampari": " Oslo [1], Rome 2 [2]."}
    asked(root, tokenizer, records, replies)
    summary = judge_cited(open_cited(records, out, data_root=root), judge, name="mine")
    samples = {each["subtask"]: each for each in read_jsonl(out) if each["kind"] == "sample"}
    assert samples["qampari"]["metrics"] == {
        "correctness": 0.0,
        "citation_recall": 0.5,
        "citation_precision": 0.5,
    }
    assert samples["qampari"]["score"] == pytest.approx(1 / 3)
    assert samples["asqa"]["score"] is None and samples["asqa"]["metrics"]["citation_recall"] is None
    assert samples["asqa"]["unscored"] == "judge: nothing said of 1 of 2 pairs"
    assert samples["asqa"]["citations"]["sentences"] == 2  # "1843" is too short for one
    assert summary["judgements"] == {"asked": 4, "unjudged": 1}
    means = {(row["subtask"], row["metric"]): (row["scored"], row["mean"]) for row in summary["by_metric"]}
    assert means["asqa", "correctness"] == (1, 1.0) and means["asqa", "citation_recall"] == (0, None)
    with pytest.raises(ArgumentError, match="something of every pair"):
        judge_cited(open_cited(records, tmp_path / "c.jsonl", data_root=root), lambda pairs: [], name="mine")
    (root / "alce/asqa_eval_gtr_top2000.json").write_text(json.dumps([ASQA, ASQA]))
    with pytest.raises(DataError, match="is not the file that was asked"):
        judge_cited(open_cited(records, tmp_path / "d.jsonl", data_root=root), judge, name="mine")


def test_folders_are_checked_before_a_judge_is_loaded(
    root: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong folder was named after minutes of loading a judge of 11B parameters."""
    asked(root, tokenizer, tmp_path / "a.jsonl", {"asqa": " Ada wrote it [1]."})

    def load(model: str) -> None:
        raise AssertionError("the judge is loaded")

    monkeypatch.setattr("longspan.infer.entailment.EntailmentModel", load)
    command = ["eval", "rescore", str(tmp_path / "a.jsonl"), "--scorer", "citations", "--judge", "t5"]
    given = ["--data-root", str(tmp_path / "none"), "--out", str(tmp_path / "b.jsonl")]
    outcome = CliRunner().invoke(app, command + given)
    assert isinstance(outcome.exception, DataError) and "is not there" in str(outcome.exception)
    assert not (tmp_path / "b.jsonl").exists()


def test_judges_that_are_asked_over_http(root: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A reply that is no verdict is none; a server that does not answer leaves the sample to the next call."""
    records, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    asked(root, tokenizer, records, {"asqa": " Ada wrote it [1].", "qampari": " Oslo [1], Rome."})

    def reply(request: Any) -> Any:
        text = json.dumps(request.body)
        assert "<premise>" in text and "<hypothesis>" in text
        return chat("1" if "Oslo" in text else "It does")

    with serving(reply) as server, client_of(server) as client:
        summary = judge_cited(open_cited(records, out, data_root=root), server_judge(client), name="judge-7b")
    assert summary["unscored"] == {"judge: nothing said of 1 of 1 pairs": 1} and summary["scored"] == 1

    def busy(pairs: Any) -> list[bool]:
        raise NotNowError

    with pytest.raises(RunError, match="2 of 2 samples were not judged"):
        judge_cited(open_cited(records, tmp_path / "c.jsonl", data_root=root), busy, name="busy")


def write_judge(folder: Path, says: str) -> None:
    """Write a text-to-text model that says one word, whatever it is asked."""
    words = [*["<pad>", "</s>", "<unk>", "0", "1", "premise:", "hypothesis:", "ada", "wrote"]]
    plain = Words(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=len(words), d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, **ids)
    )
    # It says one word, whatever its random weights are.
    model.generation_config.forced_bos_token_id = words.index(says)
    model.generation_config.suppress_tokens = [n for n in range(2, len(words)) if words[n] != says]
    model.generation_config.no_repeat_ngram_size = 1
    model.save_pretrained(folder)


@pytest.mark.parametrize("says", ["1", "0"])
def test_a_judge_that_is_run_here(tmp_path: Path, says: str) -> None:
    """What a text-to-text model answers is its verdict; another kind of model is refused by a message."""
    write_judge(tmp_path, says)
    assert EntailmentModel(str(tmp_path)).judge([("ada wrote", "ada"), ("", "")]) == [says == "1"] * 2
    with pytest.raises(ConfigError, match="is not read as a model that judges"):
        EntailmentModel(str(tmp_path / "none"))


def test_settings_that_do_not_go_together() -> None:
    """The passages are needed for citations alone, and a judge is asked by two rules only."""
    with pytest.raises(ConfigError, match="--data-root goes with"):
        RescoreConfig(scorer="citations", judge="t5")
    with pytest.raises(ConfigError, match="--data-root goes with"):
        RescoreConfig(scorer="rouge_1", data_root="d")
    with pytest.raises(ConfigError, match="no judge is asked"):
        RescoreConfig(scorer="citations", judge="t5", data_root="d", criteria="kamradt")
