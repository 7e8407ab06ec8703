"""The example at the end of every command's help runs as it is written."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import typer.main

from longspan.cli.main import app

# Each example finds what the ones before it have made, as a reader finds it who copies them in turn.
STORY = (
    ("data", "fetch"),
    ("data", "tokenize"),
    ("data", "lengths"),
    ("data", "audit"),
    ("data", "chat"),
    ("data", "mix"),
    ("data", "pack"),
    ("data", "peek"),
    ("data", "verify"),
    ("data", "convert"),
    ("data", "merge"),
    ("data", "split"),
    ("data", "pairs"),
    ("data", "retrieval"),
    ("synth", "list"),
    ("synth", "qa"),
    ("plan",),
    ("train",),
    ("import-config",),
    ("export",),
    ("annotate", "topk"),
    ("annotate", "merge"),
    ("eval", "list"),
    ("eval", "needle"),
    ("eval", "ppl"),
    ("eval", "passkey"),
    ("eval", "tool_calls"),
    ("eval", "topics"),
    ("eval", "ruler"),
    ("eval", "ruler_v2"),
    ("eval", "longqa"),
    ("eval", "mrcr"),
    ("eval", "graphwalks"),
    ("eval", "nolima"),
    ("eval", "babilong"),
    ("eval", "longbench_v2"),
    ("eval", "lveval"),
    ("eval", "longproc"),
    ("eval", "needlebench"),
    ("eval", "ancestral_trace"),
    ("eval", "rescore"),
    ("eval", "harness"),
    ("ask",),
    ("report",),
    ("doctor",),
)
SLOW = (("quickstart",),)


def examples() -> dict[tuple[str, ...], list[list[str]]]:
    """Return the example command lines of every command, without the word longspan."""
    found: dict[tuple[str, ...], list[list[str]]] = {}

    def collect(group, path: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                collect(command, (*path, name))
                continue
            lines = [line.strip() for line in command.epilog.splitlines()]
            found[*path, name] = [shlex.split(line)[1:] for line in lines if line.startswith("longspan ")]

    collect(typer.main.get_command(app), ())
    return found


def test_every_command_is_in_the_story():
    """A new command is tested here or not at all."""
    assert set(examples()) == {*STORY, *SLOW}


def write_released_files(root: Path) -> None:
    """Write long-llm/ with a question of each kind that the examples ask, and a row of other benchmarks."""
    talk = [
        {"role": "user", "content": "write a poem"},
        {"role": "assistant", "content": "Ada wrote it. " * 20},
    ]
    wanted = {"answer": "k1Ada wrote it.", "random_string_to_prepend": "k1", "n_needles": 2}
    graph = {"prompt": "n1 -> n2\n" * 30, "answer_nodes": ["n1"], "problem_type": "parents"}
    (root / "chats.jsonl").write_text(json.dumps({"messages": talk}))
    (root / "mrcr.jsonl").write_text(json.dumps({"prompt": json.dumps([*talk, talk[0]]), **wanted}))
    (root / "graphwalks.jsonl").write_text(json.dumps(graph))
    fact = {"input": "Mary went home. " * 9, "question": "Where is Mary?", "target": "kitchen"}
    choices = {f"choice_{letter}": letter for letter in "ABCD"}
    kinds = {"difficulty": "easy", "length": "short", "domain": "Code"}
    long = {"context": "Ada wrote it. " * 40, "input": "Who wrote it?", "answers": ["Ada"], "answer": "A"}
    needle = {
        "id": "0001",
        "needle": "{CHAR} is here.",
        "questions": {"onehop": "Who is?"},
        "character_set": ["Ada"],
    }
    files = {
        "babilong/data/qa1/1k.json": [fact],
        "longbench-v2.json": [{**long, **choices, **kinds, "question": "Who?"}],
        "lveval/hotpotwikiqa_mixup_16k.jsonl": long,
        "longproc/countdown/countdown_0.5k.json": [{"nums": [9, 16, 6, 18], "target": 12}],
        "longproc/countdown/prompts.yaml": {"USER_PROMPT": "Numbers: {nums} Target: {target}"},
        "ruler2/qa_basic/test.jsonl": {"question": "n1 -> n2\n" * 30, "expected_answer": ["n1"]},
        "nolima/needle_set.json": [
            {**needle, "tests": {"T1": {"input_args": []}}, "task_template": "{haystack} {question}"}
        ],
    }
    relations = {
        "templates_en": ["{A} is {B}'s {relationship}."],
        "terms_en": ["dad"],
        "generation_map_en": {},
    }
    asked = (
        "shuffled_story_with_prompt",
        "nth_ancestor_prompt",
        "nth_descendant_prompt",
        "relationship_distance_prompt",
    )
    lines = [f"relationship_{name} = {value!r}" for name, value in relations.items()]
    lines += [f"{name}_en = '{{shuffled_story}} Who?'" for name in asked]
    files["needlebench/PaulGrahamEssays.jsonl"] = {"text": "Ada wrote it on a day.\n" * 60}
    files["needlebench/needles.jsonl"] = {
        "needle": "Ada has a shard.",
        "retrieval_question": "What has Ada? Please answer in the format 'Ada has a ___.'",
        "arg1": "Ada",
        "arg2": "shard",
        "language": "English",
    }
    files["needlebench/names.json"] = {"English": "Ada,Bo,Cy,Di,Ed"}
    (root / "axolotl.yaml").write_text(
        "{base_model: m, sequence_len: 64, learning_rate: 1e-4, datasets: [{path: chats.jsonl, type: chat_template}]}"
    )
    (root / "sft.sh").write_text("swift sft --dataset chats.jsonl --max_length 64")
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    (root / "needlebench/atc.py").write_text("\n".join(lines))
    (root / "nolima/book.txt").write_text("Ada wrote it on a day.\n" * 200)
    row = {"query": "Which?", "subject": "anatomy", "choices": list("wxyz"), "answer": 2, "query_id": 0}
    question = {"context": "Ada wrote it.", "input": "Who wrote it?", "answers": ["Ada"]}
    rows = {"mmlu/test.json": row, "mmlu/dev.json": row, "longbench/qasper.jsonl": question}
    for name, content in rows.items():
        path = root / "long-llm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content) + "\n")


def test_examples_run_in_turn(longspan, corpus, tmp_path, monkeypatch):
    for name in ("texts", "tokenizer", "questions.jsonl"):
        (tmp_path / name).symlink_to(corpus / name)
    shutil.copy(corpus / "recipe.yaml", tmp_path)
    write_released_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in STORY:
        for arguments in examples()[path]:
            if path[0] in ("annotate", "eval") and not (tmp_path / "model").exists():
                # A reader has a model; here it is the one that the example of `train` made.
                shutil.copytree("run/stages/short", "model")
                shutil.copy("tokenizer/tokenizer.json", "model")
            outcome = longspan(arguments)
            assert outcome.code == 0, f"longspan {shlex.join(arguments)}\n{outcome.err}"
            assert outcome.out.strip(), f"longspan {shlex.join(arguments)} printed nothing"
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_example_of_quickstart(longspan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (arguments,) = examples()["quickstart",]
    outcome = longspan(arguments)
    assert outcome.code == 0, outcome.err
    assert "report.html" in outcome.out
    assert (tmp_path / "quickstart-run" / "report.html").exists()
