"""MRCR, GraphWalks and RULERv2 on stand-ins of the released files' structure: bins, prompts, scores, broken rows."""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.data.tokenizer import Tokenizer
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.metrics import graphwalks_f1, mrcr_ratio
from longspan.eval.prompts import PromptForm
from longspan.eval.records import read_records
from longspan.eval.released.graphwalks import GraphWalks, GraphWalksConfig
from longspan.eval.released.mrcr import Mrcr, MrcrConfig
from longspan.eval.released.ruler_v2 import RulerV2, RulerV2Config
from longspan.eval.scorers import scorer_named
from tests.eval.conftest import make_text
from tests.eval.perfect import run_perfect, run_wrong


def mrcr_row(number: int, needles: int, turns: int) -> dict[str, Any]:
    """Return a row as openai/mrcr has them: every odd turn an answer, one of them wanted behind a drawn string."""
    talk = []
    for turn in range(turns):
        talk.append({"role": "user", "content": f"write a poem about topic {turn % 3}"})
        talk.append({"role": "assistant", "content": make_text(100 * number + turn, 3)})
    wanted = talk[2 * (turns // 2) + 1]["content"]
    talk.append({"role": "user", "content": f"Prepend key{number} to the 2nd poem about topic 1."})
    return {
        "prompt": json.dumps(talk),
        "answer": f"key{number}{wanted}",
        "random_string_to_prepend": f"key{number}",
        "n_needles": needles,
        "desired_msg_index": 2 * (turns // 2) + 1,
        "total_messages": len(talk),
        "n_chars": sum(len(turn["content"]) for turn in talk),
    }


def graph_row(number: int, kind: str, edges: int) -> dict[str, Any]:
    """Return a row as openai/graphwalks has them."""
    drawn = np.random.default_rng(number).integers(0, 40, size=(edges, 2)).tolist()
    lines = "\n".join(f"n{one:02x} -> n{two:02x}" for one, two in drawn)
    prompt = f"You will be given a graph.\n{lines}\n\nOperation:\nFind the parents of node n07.\n"
    nodes = sorted({f"n{one:02x}" for one, two in drawn if two == 7})
    return {"prompt": prompt, "answer_nodes": nodes, "problem_type": kind, "prompt_chars": len(prompt)}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """2needle.parquet and 4needle.jsonl in one folder, graphs.parquet in another."""
    for name in ("mrcr", "graphs"):
        (tmp_path / name).mkdir()
    rows = [mrcr_row(n, 2, turns) for n, turns in enumerate((2, 3, 9, 10, 40))]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "mrcr/2needle.parquet")
    lines = [json.dumps(mrcr_row(10 + n, 4, 4)) for n in range(3)]
    lines += [json.dumps({**mrcr_row(9, 4, 4), "prompt": "no turns"}), "[1]"]
    (tmp_path / "mrcr/4needle.jsonl").write_text("\n".join(lines))
    graphs = [graph_row(n, ("bfs", "parents")[n % 2], edges) for n, edges in enumerate((24, 24, 60, 60))]
    pa.parquet.write_table(pa.Table.from_pylist(graphs), tmp_path / "graphs/graphs.parquet")
    return tmp_path


def mrcr(released: Path, form: PromptForm, *, strict: bool = False, **values: Any) -> Mrcr:
    config = MrcrConfig.from_dict({"lengths": [512, 1024], **values})
    return Mrcr.from_config(config, TaskDataConfig(paths=(str(released / "mrcr"),), strict=strict), form)


def test_rows_stand_in_the_bin_of_their_tokens(released: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Bins by characters, or by another tokenizer, put rows at lengths that the model does not read."""
    task = mrcr(released, PromptForm(tokenizer))
    planned = task.plan()
    for sample in planned:
        built = task.build(sample)
        talk = json.loads(task._rows[sample.key].rows[sample.fields["sample"]]["prompt"])
        texts = [*(turn["content"] for turn in talk), built.expected]
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        assert sample.fields["length"] == (512 if tokens <= 512 else 1024) and tokens >= 256
        assert built.fields["achieved_length"] == tokens
    assert {sample.fields["num_needles"] for sample in planned} == {2, 4}
    assert run_perfect(task, tokenizer, tmp_path / "perfect.jsonl")["mean"] == 1.0
    assert run_wrong(task, tokenizer, tmp_path / "wrong.jsonl")["mean"] == 0.0
    header = read_records(tmp_path / "perfect.jsonl").header
    assert header["axes"] == {"columns": "length", "rows": "num_needles"}
    assert header["params"]["left_out_records"] == 2 and len(header["params"]["data_sha256"]) == 2
    few = mrcr(released, PromptForm(tokenizer), needles=[4], samples=1)
    assert [sample.fields["num_needles"] for sample in few.plan()] == [4]


def test_turns_are_a_chat_where_the_model_chats(released: Path, tokenizer: Tokenizer) -> None:
    """A conversation put as one message of a user is another and easier prompt than the released one."""
    form = PromptForm(tokenizer, chat_server=True)
    task = mrcr(released, form, needles=[4])
    request = task.build(task.plan()[0]).request
    assert request.messages is not None and len(request.messages) == 9
    assert [turn["role"] for turn in request.messages[:2]] == ["user", "assistant"]
    assert "User: write a poem" in mrcr(released, PromptForm(tokenizer)).build(task.plan()[0]).request.prompt


def test_rows_that_are_none(released: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """One broken row ended the job, or was left out without a word."""
    mrcr(released, PromptForm(tokenizer))
    assert (
        "4needle.jsonl: row 4 holds no conversation" in caplog.text and "2 rows are left out" in caplog.text
    )
    with pytest.raises(DataError, match="holds no conversation"):
        mrcr(released, PromptForm(tokenizer), strict=True)
    with pytest.raises(DataError, match="no row of mrcr is asked"):
        mrcr(released, PromptForm(tokenizer), lengths=[64])
    with pytest.raises(DataError, match="holds no rows"):
        Mrcr.from_config(MrcrConfig(), TaskDataConfig(paths=(str(released / "none"),)), PromptForm(tokenizer))
    with pytest.raises(ArgumentError, match="rows are read from files"):
        Mrcr.from_config(MrcrConfig(), TaskDataConfig(), PromptForm(tokenizer))
    with pytest.raises(ArgumentError, match="random_string_to_prepend"):
        scorer_named("mrcr_ratio").score("a", "a")


def test_graphs_by_kind_and_length(released: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Answers are the nodes of the last line; kinds are rows of the report."""
    config = GraphWalksConfig.from_dict({"lengths": [512, 1024]})
    data = TaskDataConfig(paths=(str(released / "graphs/graphs.parquet"),))
    task = GraphWalks.from_config(config, data, PromptForm(tokenizer))
    assert {(s.fields["problem_type"], s.fields["length"]) for s in task.plan()} == {
        (kind, length) for kind in ("bfs", "parents") for length in (512, 1024)
    }
    built = task.build(task.plan()[0])
    line = f"I walk.\nFinal Answer: [{', '.join(built.expected)}]"
    assert scorer_named("graphwalks_f1").score(built.expected, line) == 1.0
    assert run_wrong(task, tokenizer, tmp_path / "wrong.jsonl")["mean"] == 0.0


def test_ratio_is_difflibs_behind_the_prefix() -> None:
    """As the code on the data set's card, on 1,000 random outputs."""
    draw = np.random.default_rng(0)
    for number in range(1000):
        answer = "Xy7" + "".join(draw.choice(list("abc \n"), size=40))
        output = ("Xy7" if number % 3 else "") + "".join(draw.choice(list("abc \n"), size=30))
        theirs = 0.0
        if output.startswith("Xy7"):
            theirs = float(
                SequenceMatcher(None, output.removeprefix("Xy7"), answer.removeprefix("Xy7")).ratio()
            )
        assert mrcr_ratio(answer, output, "Xy7") == theirs


def test_f1_of_two_sets_of_nodes() -> None:
    """2PR / (P + R) of the sets, on 1,000 random pairs; a wrong answer is 0 and a last line that is no list too."""
    draw = np.random.default_rng(1)
    names = [f"{n:04x}" for n in range(12)]
    for _ in range(1000):
        wanted, given = ({names[n] for n in draw.integers(0, 12, size=draw.integers(0, 6))} for _ in range(2))
        common = len(wanted & given)
        recall, precision = common / len(wanted) if wanted else 0, common / len(given) if given else 0
        theirs = 2 * recall * precision / (recall + precision) if common else float(not wanted and not given)
        assert graphwalks_f1(sorted(wanted), f"So.\nFinal Answer: [{', '.join(given)}]") == pytest.approx(
            theirs
        )
    assert graphwalks_f1(["a"], "Final Answer: [a]\n") == 0.0, "the last line is empty"
    assert graphwalks_f1(["a"], "Final Answer: a") == 0.0
    assert graphwalks_f1(["a", "b"], "Final Answer:[a , b]") == 1.0


def test_rows_of_several_dates(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """A benchmark that was revised holds old and new rows; a mean over both is no published one."""
    rows = [
        {**graph_row(n, "bfs", 24), "date_added": date} for n, date in enumerate(["04-12-2025", "02-27-2026"])
    ]
    (tmp_path / "graphs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = TaskDataConfig(paths=(str(tmp_path),))
    sizes = {"lengths": [256, 512]}
    GraphWalks.from_config(GraphWalksConfig.from_dict(sizes), paths, PromptForm(tokenizer))
    assert "several dates (1 of 02-27-2026, 1 of 04-12-2025)" in caplog.text
    config = GraphWalksConfig.from_dict({**sizes, "added": ["04-12-2025"]})
    task = GraphWalks.from_config(config, paths, PromptForm(tokenizer))
    (planned,) = task.plan()
    assert task.build(planned).fields["date_added"] == "04-12-2025" and task.params()["added"] == [
        "04-12-2025"
    ]


def test_prepared_rows_of_ruler_v2(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The folder says the task; an answer is one text or several, and tasks weigh alike in the mean."""
    text = make_text(3, 40)
    rows = {
        "mk_niah_hard": ["B"],
        "mv_niah_basic": [["12", "34"], []],
        "qa_easy": [["3", "7"]] * 2,
        "other": ["x"],
    }
    for name, answers in rows.items():
        (tmp_path / f"m-1k/{name}").mkdir(parents=True)
        lines = [
            json.dumps({"question": f"{text} {name} {n}?", "expected_answer": a})
            for n, a in enumerate(answers)
        ]
        (tmp_path / f"m-1k/{name}/test.jsonl").write_text("\n".join(lines))
    config = RulerV2Config.from_dict({"lengths": [256, 512, 1024]})
    task = RulerV2.from_config(config, TaskDataConfig(paths=(str(tmp_path),)), PromptForm(tokenizer))
    assert task.params()["left_out_records"] == 1
    built = {str(each.key[0]): task.build(each) for each in task.plan()}
    assert built["mk_niah_hard"].request.prompt == f"{text} mk_niah_hard 0?" and built[
        "mk_niah_hard"
    ].expected == ["B"]
    summary = run_perfect(task, tokenizer, tmp_path / "a.jsonl")
    # The letter has to be boxed or announced, and one of two numbers is half of them.
    assert [row["mean"] for row in summary["cells"]] == [0.0, 0.5, 1.0] and summary["averages"][0][
        "mean"
    ] == 0.5
    with pytest.raises(ConfigError, match="there is no vt; there are mk_niah_basic"):
        RulerV2Config.from_dict({"subtasks": ["vt"]})


@pytest.mark.parametrize(
    ("subtask", "expected", "output", "score"),
    [
        ("mk_niah_basic", ["12 34"], "It is 12 34.", 1),
        ("mk_niah_easy", ["the big red house"], "the big house", 0.75),
        ("mk_niah_easy", ["a b"], "Answer: b b\nAnswer: x b c d", 0),
        ("mv_niah_easy", ["a", "zz"], "</think> A", 0.5),
        ("mv_niah_medium", ["12"], "12\n\nnone", 0),
        ("qa_basic", ["7", "9"], "Document 7: x\ny\n\nso 9", 1),
        ("qa_hard", ["7"], "Document 7: x\ny\n\nnone", 0),
        ("mk_niah_hard", ["B"], "\\boxed{A, no: B}", 1),
        ("mk_niah_hard", ["B"], "**Answer**: B", 1),
        ("mk_niah_medium", ["B"], "Answer: B \\boxed{}", 0),
    ],
)
def test_scores_of_ruler_v2(subtask: str, expected: list[str], output: str, score: float) -> None:
    """Each score is what NeMo-Skills' own code gives for this output."""
    assert scorer_named("ruler_v2").score(expected, output, {"subtask": subtask}) == pytest.approx(score)
