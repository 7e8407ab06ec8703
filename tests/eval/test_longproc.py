"""LongProc on stand-ins of its folder: searches, prompts, scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.files import sha256_bytes
from longspan.data.tokenizer import Tokenizer
from longspan.eval import compiled, metrics_longproc
from longspan.eval.held_out import TaskDataConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.released.longproc import LongProc, LongProcConfig
from longspan.eval.released.longproc_search import countdown, travel
from longspan.eval.rescoring import rescore
from longspan.eval.scorers import scorer_named
from tests.eval.perfect import run_perfect, run_wrong

TRAVEL: dict[str, Any] = {
    "num_cities": 3,
    "constraints": [
        {"type": "duration", "city": "Oslo", "num_days": 3},
        {"type": "duration", "city": "Rome", "num_days": 4},
        {"type": "fixed", "city": "Rome", "start_day": 4, "end_day": 7},
        {"type": "duration", "city": "Bern", "num_days": 4},
    ],
    "connected_cities": [["Bern", "Rome"], ["Rome", "Oslo"], ["Oslo", "Rome"]],
    "disambig_question_text": "Visit 3 cities.",
    "ground_truth_cities": "Bern**Rome**Oslo",
    "ground_truth_durations": "4**4**3",
    "estimated_output_tokens": 700,
}
ROWS: dict[str, tuple[str, Any]] = {
    "countdown_0.5k": ("{demonstration}\n{nums} {target}", {"nums": [9, 16, 6, 18], "target": 12}),
    "path_traversal_2k": (
        "{city_context} {src_city} {dst_city}",
        {"context_nl": "Roads.", "question_repr": ["A", "B"], "answer_nl": "From A, to C.\nFrom C, to B."},
    ),
    "tom_tracking_0.5k": (
        "{story} {question} {{x}}",
        {
            "story": "Once.",
            "question": "Where?",
            "solution": "So:\n- Step 0: in the hall\n- Step 1: None\nFinal",
        },
    ),
    "travel_planning_all": ("{demonstration}\n{problem}", TRAVEL),
    "html_to_tsv_8k": (
        "{html_str} {task_topic} {task_description}{filtering_instruction} {tsv_header}",
        {
            **dict.fromkeys(("task_topic", "task_description", "filtering_instruction"), "a"),
            "tsv_header": "n\tm",
            "gt": "n\tm\n1\tThe Hall\n2\tb",
            "html_path": "web/a.html",
        },
    ),
}


def sha256(text: str) -> str:
    return sha256_bytes(text.encode())[:16]


@pytest.fixture
def released(tmp_path: Path) -> Path:
    for name, (prompt, row) in ROWS.items():
        folder = tmp_path / "data" / name.rsplit("_", 1)[0]
        (folder / "web").mkdir(parents=True)
        (folder / "web/a.html").write_text("<p>1</p>")
        (folder / "prompts.yaml").write_text(json.dumps({"USER_PROMPT": prompt}))
        (folder / f"{name}.json").write_text(json.dumps([row, {}]))
        (folder / "travel_planning_icl_examples.json").write_text(json.dumps([TRAVEL]))
    return tmp_path / "data"


def task(released: Path, tokenizer: Tokenizer, *, strict: bool = False, **values: Any) -> LongProc:
    paths = TaskDataConfig(paths=(str(released),), strict=strict)
    return LongProc.from_config(LongProcConfig.from_dict(values), paths, PromptForm(tokenizer))


def test_searches_are_the_published_ones() -> None:
    """A word of a search that differs is another prompt, and another procedure to be right by.

    The numbers are SHA-256 of what LongProc's own code makes of the same problems.
    """
    assert [sha256(countdown(*given)[1]) for given in (((9, 16, 6, 18), 12), ((3, 50, 2, 7), 33))] == [
        "812887c9243bc785",
        "b74aa7e21de021a5",
    ]
    assert sha256(travel(TRAVEL)) == "44cf582b979c7dc5"
    with pytest.raises(ValueError, match="do not reach 1999"):
        countdown((1, 1, 1, 1), 1999)


def test_procedures(
    released: Path, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts are those of the files, the room is the level's, and what is no problem is counted."""
    whole = task(released, tokenizer)
    planned = {p.fields["subtask"]: p for p in whole.plan()}
    assert {name: p.fields["output_length"] for name, p in planned.items()} == {
        "countdown": 512,
        "path_traversal": 2048,
        "tom_tracking": 512,
        "travel_planning": 2048,
        "html_to_tsv": 8192,
    }
    assert "5 rows are left out" in caplog.text
    built = {name: whole.build(p) for name, p in planned.items()}
    assert {name: each.request.max_new_tokens for name, each in built.items()}["html_to_tsv"] == 10240
    assert built["tom_tracking"].request.prompt == "Once. Where? {x}"
    assert built["html_to_tsv"].request.prompt.startswith("<p>1</p> a")
    assert built["countdown"].request.prompt.startswith(
        "# Example\nNumbers: [40, 19, 23, 7]\nTarget: 29\n\n# Search"
    )
    assert built["travel_planning"].request.prompt.startswith(
        "# Example\nVisit 3 cities.\n\n<Solving Procedure>"
    )
    few = task(released, tokenizer, subtasks=["countdown", "tom_tracking"])
    assert run_perfect(few, tokenizer, tmp_path / "perfect.jsonl")["mean"] == 1.0
    assert run_wrong(whole, tokenizer, tmp_path / "wrong.jsonl")["mean"] == 0.0


@pytest.mark.parametrize(
    ("subtask", "output", "right", "partial"),
    [
        ("path_traversal", "<Route>\nFrom A, to C.\nFrom C, to B.\n</Route>", 1, 1),
        ("path_traversal", "<Route>\nFrom A, to C.\nFrom C, to D.\n</Route>", 0, 1),
        ("path_traversal", "From A, to C.", 0, 0),
        ("tom_tracking", "- Step 0: at Hall!\n- Step 1: none", 1, 1),
        ("tom_tracking", "- Step 0: the hall\n- Step 1: kitchen", 0, 0.5),
        ("html_to_tsv", "```tsv\nx\ty\n2\tB\n1\thall\n```", 1, 1),
        ("html_to_tsv", "n\tm\n2\tb\nso it is", 2 / 3, 2 / 3),
        ("html_to_tsv", "n\tn\n2\tb", 0, 0),
        ("countdown", "<Solution>\n9 + 16 = 25\n25 + 6 = 31\n31 - 18 = 13\n</Solution>", 0, 0),
        ("countdown", "<Solution>\n__import__('os') = 1\n1\n2\n</Solution>", 0, 0),
        (
            "travel_planning",
            "<Plan>\nDay 1-4: Bern\nDay 4: from Bern to Rome\nDay 7: from Rome to Oslo\n7-9\n</Plan>",
            1,
            1,
        ),
    ],
)
def test_scores(
    released: Path, tokenizer: Tokenizer, subtask: str, output: str, right: float, partial: float
) -> None:
    """Each score is what LongProc's own code gives for this output; no text is run as code."""
    one = task(released, tokenizer, subtasks=[subtask])
    planned = one.plan()[0]
    built = one.build(planned)
    fields = {**planned.fields, **built.fields}
    assert scorer_named("longproc").score(built.expected, output, fields) == pytest.approx(right)
    assert scorer_named("longproc_partial").score(built.expected, output, fields) == pytest.approx(partial)


def write_programs(released: Path) -> None:
    folder = released / "pseudo_to_code"
    folder.mkdir()
    (folder / "prompts.yaml").write_text(json.dumps({"USER_PROMPT": "Write:\n{pseudocode}"}))
    row = {
        "pseudocode_lines": ["read", "add"],
        "code_lines": ["int x;"],
        "testcases": [[["1 2"], ["3"]]] * 12,
    }
    (folder / "pseudo_to_code_0.5k.json").write_text(json.dumps([row, {**row, "testcases": []}]))


def test_programs_are_run_where_that_is_asked_for(
    released: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model wrote is never run by a default, nor because a records file says so; no compiler, no work."""
    write_programs(released)
    assert "pseudo_to_code" not in {p.fields["subtask"] for p in task(released, tokenizer).plan()}
    with pytest.raises(ConfigError, match="which run_code allows"):
        task(released, tokenizer, subtasks=["pseudo_to_code"])
    one = task(released, tokenizer, subtasks=["pseudo_to_code"], run_code=True)
    (planned,) = one.plan()
    built = one.build(planned)
    assert built.request.prompt == "Write:\nread\nadd" and len(built.fields["test_cases"]) == 10
    records = tmp_path / "a.jsonl"
    ran: list[str] = []
    monkeypatch.setattr(metrics_longproc, "passes", lambda code, cases: not ran.append(code))
    run_wrong(one, tokenizer, records)
    assert ran == []  # "~" holds no program
    lines = records.read_text().replace('"output": "~"', '"output": "```c++ int x;```"')
    records.write_text(lines)
    with pytest.raises(ArgumentError, match="--run-code allows it"):
        rescore(records, "longproc", tmp_path / "b.jsonl")
    assert rescore(records, "longproc", tmp_path / "b.jsonl", run_code=True)["mean"] == 1.0
    assert ran == [" int x;"]
    monkeypatch.setenv("PATH", str(tmp_path))
    compiled.compiler.cache_clear()
    with pytest.raises(ArgumentError, match=r"no C\+\+ compiler"):
        task(released, tokenizer, run_code=True)
    compiled.compiler.cache_clear()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")
def test_programs_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless program, one that writes without end and one that leaves others behind all end, and are wrong."""
    monkeypatch.setattr(compiled, "_HEADERS", ("cstdio", "unistd.h"))  # the others cost seconds
    case = [["1 2", "4"], ["7"]]
    body = 'int main() {{ int a, b, c; scanf("%d %d %d", &a, &b, &c); {} }}'
    last = 'printf("%d\\n", a + b + c); return 3;'
    assert compiled.passes(body.format(last), [case] * 2)
    assert not compiled.passes(body.format(last), [case, [["1 1 1"], ["4"]]])
    endless = f'{last[:-9]} fflush(stdout); if (fork()) for (;;) puts("7"); for (;;) sleep(1);'
    assert not compiled.passes(body.format(endless), [case])
    assert not compiled.passes("int main( {", [case])


def test_folders_that_are_not_whole(released: Path, tokenizer: Tokenizer) -> None:
    """A missing prompt file, a page outside of the folder and an unknown name are said before work begins."""
    with pytest.raises(ConfigError, match="there is no pseudo_code"):
        task(released, tokenizer, subtasks=["pseudo_code"])
    with pytest.raises(ArgumentError, match="needs the field 'subtask'"):
        scorer_named("longproc").score("a", "a")
    row = {**ROWS["html_to_tsv_8k"][1], "html_path": "../../../secret"}
    (released / "html_to_tsv/html_to_tsv_8k.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match="leaves the folder"):
        task(released, tokenizer, subtasks=["html_to_tsv"], strict=True)
    (released / "countdown/prompts.yaml").unlink()
    with pytest.raises(DataError, match=r"prompts.yaml is not there"):
        task(released, tokenizer, subtasks=["countdown"], strict=True)
