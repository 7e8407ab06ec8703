"""`longspan eval needle` on a small random model: what is printed, and what is refused with which words."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

GRID = "eval needle --model model --out run --lengths 256,320 --depths 0:1:3 --samples 2"


def test_a_grid_is_a_table_and_records(longspan, model, tmp_path):
    """Counts and interval stand beside every mean, and a second call reads the records."""
    outcome = longspan(GRID)
    assert outcome.code == 0, outcome.err
    for part in (
        "0.5",
        "mean",
        "95% interval",
        "unscored",
        "12 of 12 samples scored",
        "effective context",
    ):
        assert part in outcome.out
    records = tmp_path / "run" / "records" / "needle-model.jsonl"
    whole = records.read_bytes()
    again = longspan(f"{GRID} --json --threshold 0.5")
    assert records.read_bytes() == whole
    summary = json.loads(again.out)
    assert (summary["samples"], summary["effective_threshold"]) == (12, 0.5)
    assert [row["length"] for row in summary["by_length"]] == [256, 320]
    plain = longspan(f"{GRID} --label plain --no-prefix-reuse --json")
    assert json.loads(plain.out)["cells"] == summary["cells"]


def test_own_texts_and_modes(longspan, model, tmp_path):
    """A sentence of one's own, generated; several needles; a needle at every depth: records of their own."""
    lines = [
        "--needle 'The cat sleeps.' --question 'What does the cat do?' --answer sleeps --mode generate",
        "--num-needles 2 --mode generate --num-distractors 1",
        "--multi-key --note 'all depths at once'",
        "--scorer rouge_l --mode generate --label rouge --chat-template qwen",
    ]
    for line in lines:
        outcome = longspan(f"{GRID} {line}")
        # The tokenizer has no special tokens of a chat: they are read as text.
        assert outcome.code == 0, outcome.err
    names = sorted(path.name for path in (tmp_path / "run" / "records").iterdir())
    assert names == [
        "needle-model.jsonl",
        "needle-rouge.jsonl",
        "needle_multi-model.jsonl",
        "needle_multikey-model.jsonl",
    ]


def test_dry_run_shows_grid_and_cost_without_a_model(longspan, store):
    """440 prompts of up to 1M tokens should be seen before they are begun."""
    outcome = longspan(
        "eval needle --model m --tokenizer tokenizer --preset easycontext --dry-run --json --out r"
    )
    assert outcome.code == 0, outcome.err
    cost = json.loads(outcome.out)
    assert (cost["cells"], cost["prompts"]) == (220, 440)
    assert cost["prompt_tokens"] == 22 * sum(range(50_000, 1_000_001, 50_000))
    assert cost["factor_linear"] == pytest.approx(1.97, abs=0.02)
    assert cost["factor_attention"] == pytest.approx(1.5, abs=0.03)
    text = longspan("eval needle --model m --tokenizer tokenizer --lengths 1k,2k --dry-run --out r").out
    assert "1,024" in text and "depths: 0, 0.25, 0.5, 0.75, 1" in text and "times fewer" in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--depths 0,50,100", ["depths", "between 0 (start) and 1"]),
        ("--depths 0:1", ["depths", "start:end:count"]),
        ("--depths 0:inf:3", ["depths", "inf is not a depth"]),
        ("--lengths 0:1", ["lengths", "start:end:count, such as 1k:8k:8"]),
        ("--lengths 1k:8k:0", ["lengths", "count of values of 1 or more"]),
        ("--lengths 1k,1024", ["lengths", "1024 stands twice"]),
        ("--lengths 20 --dry-run", ["no room for the planted facts", "20 tokens"]),
        ("--needle abc --question Which? --answer ''", ["answer is empty"]),
        ("--model ''", ["no model is named", "openai:NAME"]),
        ("--model openai: --tokenizer tokenizer", ["no model is named", "openai:NAME"]),
        ("--model opnai:gpt", ["no such model", "opnai:gpt", "openai:NAME"]),
        ("--model model/config.json", ["is a file, not a model", "the folder that it lies in"]),
        ("--model openai:x --tokenizer tokenizer --rope-theta 5e6", ["is decided there", "--rope-theta"]),
        (
            "--mode teacher_forced --max-new-tokens 9",
            ["no effect with mode teacher_forced", "--mode generate"],
        ),
        ("--schedule ring", ["schedule has no effect without cp"]),
        ("--rope linear", ["--rope does not hold settings", "'linear'"]),
        ("--lengths 20", ["no room for the planted facts", "20 tokens"]),
        ("--data texts --lengths 1M", ["haystack is too short", "--repeat"]),
        ("--max-length 300", ["longer than the model can read", "320 tokens", "--too-long skip"]),
        ("--bos always --tokenizer nobos", ["no BOS token", "--bos"]),
        ("--preset easy", ["preset", "easycontext"]),
        ("--preset easycontext --exact", ["no exact form", "longllm"]),
        ("--exact", ["--exact says how a preset is meant", "--preset"]),
        ("--scorer rouge", ["no scorer 'rouge'", "rouge_l"]),
        ("--needle 'It is {numbr}.'", ["{numbr}", "{number}"]),
        ("--chat-template gpt", ["no such chat template", "llama-3"]),
    ],
)
def test_mistakes_say_how_to_mend_them(longspan, model, arguments, parts):
    """No traceback, and nothing is recorded."""
    folder = model.parent / "nobos"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text("{}")
    outcome = longspan(f"{GRID} {arguments}")
    assert outcome.code == 2, outcome.err
    message = outcome.err[outcome.err.index("error: ") :]
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in message, message
    assert not (model.parent / "run").exists()


def test_a_file_is_no_run_folder(longspan, model):
    """It was found when the model had been loaded, as a failure of the machine."""
    outcome = longspan(f"{GRID} --out model/config.json")
    assert outcome.code == 2 and "is a file" in outcome.err
    outcome = longspan("eval ruler --model model --lengths 2k --sample-cache model/config.json --out run")
    assert outcome.code == 2 and "is a file" in outcome.err


def test_a_tokenizer_of_far_fewer_words_is_doubted(longspan, model):
    """All ids of a small tokenizer are known to a large model, which was asked in the wrong words in silence."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(model.parent / "many")
    outcome = longspan("ask many --tokenizer tokenizer --question Why? --max-new-tokens 1")
    assert outcome.code == 0 and "is it the model's own?" in outcome.err
    assert "is it the model's own?" not in longspan("ask model --question Why? --max-new-tokens 1").err


def test_another_tokenizer_is_not_an_index_error(longspan, model):
    """A tokenizer of more words than the model has ended in a traceback, on GPUs in an abort of the device."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(model.parent / "few")
    for more in ("--label a", "--label b --no-prefix-reuse", "--label c --mode generate"):
        outcome = longspan(f"{GRID} --model few --tokenizer tokenizer {more}")
        assert outcome.code == 2, outcome.err
        assert "the tokenizer is not the model's" in outcome.err and "below 64" in outcome.err
    outcome = longspan("eval ppl --model few --tokenizer tokenizer --data store --lengths 64 --out run")
    assert outcome.code == 2 and "the tokenizer is not the model's" in outcome.err


def test_too_long_contexts_can_be_skipped(longspan, model):
    """A grid beyond what a model reads has columns without scores, not a missing column."""
    outcome = longspan(f"{GRID} --max-length 300 --too-long skip --json")
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert (summary["samples"], summary["scored"]) == (12, 6)
    assert [row["scored"] for row in summary["by_length"]] == [6, 0]


def test_list_names_tasks_presets_and_scorers(longspan):
    """What can be asked for can be found."""
    outcome = longspan("eval list")
    for name in ("needle_multikey", "ppl", "fu-2024", "easycontext", "longllm", "word_recall"):
        assert name in outcome.out
    listed = json.loads(longspan("eval list --json").out)
    assert listed["presets"]["easycontext"]["answer_digits"] == 7


def test_in_a_chat_an_answer_is_a_sentence(longspan, model):
    """A model that chats was asked for a bare number as its first token, and had none of them right."""
    line = "eval needle --model model --lengths 320 --depths 0.5 --samples 1 --dry-run --json --out r"
    prompt = json.loads(longspan(f"{line} --chat-template qwen").out)["prompt"]
    key = prompt["messages"][1]["content"].removeprefix("The magic number of ").removesuffix(" is")
    assert prompt["messages"][0]["content"].endswith(f"\nWhat is the magic number of {key}?")
    assert prompt["text"].endswith(f"assistant\nThe magic number of {key} is")
    assert (prompt["max_new_tokens"], prompt["expected"].isdecimal()) == (32, True)
    server = "--model openai:m --base-url http://localhost:1/v1 --tokenizer model"
    prompt = json.loads(longspan(f"{line.replace('--model model', server)}").out)["prompt"]
    assert prompt["messages"] is None and "? The magic number of " in prompt["text"][-80:]
    # The model's thoughts come first; what is said of the question by hand stays as it is.
    thinking = json.loads(longspan(f"{line} --chat-template qwen --thinking on").out)["prompt"]
    assert len(thinking["messages"]) == 1 and thinking["max_new_tokens"] == 32 + 4096
    own = json.loads(longspan(f"{line} --chat-template qwen --question Which?").out)["prompt"]
    assert own["text"].endswith("assistant\n") and own["max_new_tokens"] == 32
    forced = json.loads(longspan(f"{line} --chat-template qwen --mode teacher_forced").out)["prompt"]
    assert forced["max_new_tokens"] is None


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("passkey --lengths 512,640 --depths 0,1", ["40 samples", "The pass key is", "room for 77 tokens"]),
        ("topics --kind lines --counts 4", ["10 samples", "REGISTER_CONTENT"]),
        ("ruler --lengths 2k --subtasks niah_single_1", ["100 samples", "The special magic number for"]),
        ("longqa --data q.jsonl", ["1 samples", "Question: Who wrote it?", "expected: ['Ada']"]),
    ],
)
def test_dry_runs_show_one_whole_prompt(longspan, model, line, parts):
    """What a model is asked could be seen in records only, when hours had been spent on it."""
    question = {"context": "Ada wrote it.", "input": "Who wrote it?", "answers": ["Ada"]}
    (model.parent / "q.jsonl").write_text(json.dumps(question) + "\n")
    outcome = longspan(f"eval {line} --model model --max-new-tokens 77 --dry-run --out run")
    assert outcome.code == 0, outcome.err
    for part in [*parts, "77 tokens of answer"]:
        assert part in outcome.out, outcome.out[-300:]
    assert not (model.parent / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--thinking on", ["plain text has no chat template", "--chat-template"]),
        ("--template-args '[1]'", ["--template-args does not hold settings"]),
        ("--template-args '{1: 2}'", ["holds no variables", "enable_thinking"]),
        ("--chat-template qwen --template-args '{messages: []}'", ["longspan itself tells", "messages"]),
        ("--template-args '{enable_thinking: false}'", ["plain text has no chat template"]),
        ("--model openai:m --tokenizer model --server '{trained_length: -4}'", ["trained_length", "-4"]),
        (
            "--chat-template qwen --thinking on --mode teacher_forced",
            ["is to think before it", "--thinking off"],
        ),
        ("--model anthropic:m --tokenizer model --template-args '{a: 1}'", ["no variables", "--server"]),
        ("--answer-prefix 'It is'", ["--answer-prefix", "generated"]),
    ],
)
def test_mistakes_about_thinking_are_messages(longspan, model, monkeypatch, arguments, parts):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    outcome = longspan(f"{GRID} {arguments}")
    assert outcome.code == 2, outcome.err
    for part in parts:
        assert part in outcome.err
    assert not list(model.parent.glob("run/records/*"))
