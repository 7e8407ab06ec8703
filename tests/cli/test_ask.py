"""`longspan ask` puts a prompt together, shows it and writes the answer; `eval harness` reads released files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.data.tokenizer import load_tokenizer
from longspan.eval.ask import compose, template_named
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.prompts import PromptForm
from tests.api.fake_server import chunk, events, serving

NEEDLE = "The magic number of glacier is 48213."


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    """A folder with a random model, and texts beside it."""
    root = tmp_path_factory.mktemp("ask")
    tokenizer = load_tokenizer(corpus / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    shutil.copy(corpus / "tokenizer" / "tokenizer.json", root / "model")
    (root / "text.txt").write_text("".join(f"Here is sentence number {n}. " for n in range(400)))
    return root


@pytest.fixture
def here(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_the_needle_is_shown_where_it_lies(longspan, here):
    """People see that the sentence is in the text at all, which a length in tokens does not tell."""
    outcome = longspan(
        f'ask model --data text.txt --needle "{NEEDLE}" --depth 0.5 --question "Which number?" '
        "--length 600 --max-new-tokens 5"
    )
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert any(f">>> {NEEDLE} <<<" in line for line in lines)
    assert "Here is sentence number" in outcome.out
    depth = next(line for line in lines if line.startswith("needle at depth"))
    assert abs(float(depth.split()[3]) - 0.5) < 0.05
    assert any(line.startswith("input: ") and "cut off" in line for line in lines)
    assert "5 tokens in " in lines[-1]


def test_json_holds_the_same_and_nothing_else(longspan, here):
    arguments = f'ask model --data text.txt --needle "{NEEDLE}" --depth 0 --question Q? --length 500 '
    found = json.loads(longspan(f"{arguments} --max-new-tokens 3 --json").out)
    assert found["needle"]["text"] == NEEDLE and found["needle"]["depth"] == 0.0
    assert 480 <= found["prompt_tokens"] <= 500
    assert found["answer_tokens"] <= 3 and found["finish"] in ("stop", "length")
    plain = json.loads(longspan("ask model --question Hello --max-new-tokens 2 --json").out)
    assert plain["needle"] is None and plain["prompt_tokens"] < 10
    # A context that asks for itself, as released question files hold it, is the whole prompt.
    whole = json.loads(longspan("ask model --data text.txt --prompt {context} --max-new-tokens 2 --json").out)
    assert whole["question"] is None and whole["context_tokens_removed"] == 0


@pytest.mark.parametrize(
    ("parts", "finish", "thoughts", "said"),
    [
        ([{"reasoning_content": "7?"}], "length", "7?", "; cut while thinking: give more room"),
        ([{"content": "<think>7? Or"}], "length", "7? Or", "; cut while thinking: give more room"),
        ([{"content": "<think>7?</think>"}], "stop", "7?", "; thoughts without an answer"),
        ([{"content": "8 and"}], "length", "", "; the answer is cut: give more room"),
        ([{"content": "<think>7?</think>8"}], "stop", "7?", None),
    ],
)
def test_thoughts_of_a_server_that_are_all_there_is_are_said(longspan, here, parts, finish, thoughts, said):
    """Guards against thoughts on the screen, or nothing at all, that pass for the answer."""
    deltas = [{"choices": [{"index": 0, "delta": part, "finish_reason": None}]} for part in parts]
    reply = events(*deltas, chunk("", finish))
    with serving([reply, reply]) as server:
        asked = f"ask openai:served --base-url {server.url} --tokenizer model --question Q?"
        shown, found = longspan(asked), json.loads(longspan(f"{asked} --json").out)
    assert shown.code == 0, shown.err
    last = shown.out.splitlines()[-1]
    assert last.endswith(" s") if said is None else said in last
    assert found["thoughts"] == thoughts and (found["no_answer"] is None) == bool(found["answer"])


def test_mistakes_are_said(longspan, here):
    cases = {
        f'ask model --question Q? --needle "{NEEDLE}"': "--data",
        f'ask model --question Q? --data text.txt --needle "{NEEDLE}" --depth 1.5': "between 0",
        "ask model --question Q? --data text.txt --depth 1": "--depth has no effect without a sentence to plant",
        "ask model --question Q? --prompt fu-2024 --length 9": "--prompt and --length has no effect without texts",
        "ask model --question Q? --data text.txt --length 10": "no room for a context",
        "ask model --question Q? --data text.txt --prompt fu-2023": "fu-2024",
        "ask model --question Q? --data text.txt --prompt 'only {question}'": "no place for the context",
        "ask model --data text.txt": "a place for a question",
        "ask model --question Q? --data text.txt --prompt '{context}'": "no place for the question",
        "ask model": "nothing is asked",
        "ask model --question Q? --chat": "chat template",
        "ask model --question ''": "the question is empty",
        "ask model --question Q? --data text.txt --length 500 --max-length 400": "--max-new-tokens",
    }
    for arguments, said in cases.items():
        outcome = longspan(arguments)
        assert outcome.code == 2, arguments
        assert said in outcome.err, outcome.err


def test_prompts_of_the_published_tests(folder):
    """The words around context and question are those of the test that is named."""
    form = PromptForm(load_tokenizer(folder / "model"))
    documents = [HeldOutDocument("a", "One. {question} Two."), HeldOutDocument("b", "Three.")]
    composed = compose(documents, form, question="Why?", template=template_named("fu-2024"))
    assert composed.prompt == (
        "<|im_start|> This is a very long story book: <book> One. {question} Two.\n\nThree. </book>.\n "
        "Based on the content of the book, Question: Why?\nAnswer:"
    )
    assert composed.tokens == len(form.encode(composed.prompt)) and composed.place is None
    for depth in (0.0, 0.5, 1.0):
        composed = compose(
            documents, form, question="Why?", template="{context}|{question}", needle=" X y. ", depth=depth
        )
        assert composed.prompt.count("X y.") == 1 and composed.prompt.endswith("|Why?")
        assert composed.place is not None and composed.place.needle == "X y."
        assert composed.prompt.startswith("X y.") == (depth == 0.0)


def released(root: Path) -> None:
    rows = [
        {"query": f"Q{n}", "subject": "anatomy", "choices": list("wxyz"), "answer": n % 4, "query_id": n}
        for n in range(3)
    ]
    (root / "mmlu").mkdir(parents=True, exist_ok=True)
    for name in ("test.json", "dev.json"):
        (root / "mmlu" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_harness_reads_released_files_and_goes_on(longspan, here, tmp_path):
    """The table shows what the records hold; a second call asks for nothing."""
    released(tmp_path / "long-llm")
    arguments = (
        f"eval harness --model model --tasks long-llm:mmlu --data-root {tmp_path / 'long-llm'} "
        f"--num-fewshot 1 --label before --out {tmp_path / 'run'}"
    )
    outcome = longspan(arguments)
    assert outcome.code == 0, outcome.err
    assert "long-llm:mmlu, before: 3 of 3 questions scored" in outcome.out and "anatomy" in outcome.out
    path = tmp_path / "run" / "records" / "harness-long-llm-mmlu-before.jsonl"
    before = path.read_text()
    again = json.loads(longspan(f"{arguments} --json").out)["long-llm:mmlu"]
    assert again["scored"] == 3 and path.read_text() == before
    missing = longspan(f"eval harness --model model --tasks helmet:rag --data-root {tmp_path} --out run")
    assert missing.code == 2 and "nq-dev-multikilt_1000_k1000_dep6.jsonl" in missing.err
    for line, said in (
        ("--model model --tasks long-llm:longbench,mmlu", "no exact form"),
        ("--model openai:x --tokenizer model --tasks long-llm:longbench", "cannot be told the token"),
    ):
        outcome = longspan(f"eval harness {line} --exact --data-root {tmp_path} --out run")
        assert outcome.code == 2 and said in outcome.err
    unknown = longspan("eval harness --model model --tasks long-llm:mmmu --out run")
    assert unknown.code == 2 and "long-llm:infbench" in unknown.err
    nowhere = longspan("eval harness --model model --tasks helmet:icl --out run")
    assert nowhere.code == 2 and "--data-root" in nowhere.err


@pytest.mark.filterwarnings("ignore")  # those of lm-eval and what it imports are not ours
def test_harness_asks_lm_evals_tasks(longspan, here, tmp_path):
    """From a folder as the hub has it, each task to a file of its own, by the model's shared prefixes."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'longspan[harness]'")
    row = {"question": "Which?", "choices": list("wxyz"), "answer": 2}
    for subject in ("anatomy", "virology"):
        for split in ("test", "dev"):
            path = tmp_path / "mmlu" / subject / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text((json.dumps(row) + "\n") * 2)
    outcome = longspan(
        f"eval harness --model model --tasks mmlu_anatomy,mmlu_virology --data-root {tmp_path} "
        f"--num-fewshot 1 --limit 1 --out {tmp_path / 'run'}"
    )
    assert outcome.code == 0, outcome.err
    assert "mmlu_anatomy, model: 1 of 1 questions scored" in outcome.out
    names = sorted(path.name for path in (tmp_path / "run" / "records").iterdir())
    assert names == ["harness-mmlu_anatomy-model.jsonl", "harness-mmlu_virology-model.jsonl"]
    missing = longspan(f"eval harness --model model --tasks mmlu --data-root {tmp_path} --out run")
    assert missing.code == 2 and "mmlu_abstract_algebra is not there" in missing.err
