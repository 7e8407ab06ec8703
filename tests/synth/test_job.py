"""A set from documents to samples that train: what is kept, what is dropped and why, and going on after a kill."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from longspan.api import SpendingLimits
from longspan.core.errors import ConfigError, DataError, RunError, UserError
from longspan.core.records import read_jsonl
from longspan.synth import load_set, require_samples
from longspan.synth.selection import content_hash
from longspan.train.config import TrainConfig
from longspan.train.trainer import train
from tests.api.fake_server import chat, error, reply_json, serving
from tests.synth.conftest import write_documents
from tests.synth.writer import Writer, answer, days_in, document, is_known, question

SETS = ("one_detail_book", "multi_detail_book", "bio_book")


def samples(out: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(out / "train.jsonl"))


def rejected(out: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(out / "rejected.jsonl"))


@pytest.mark.parametrize("style", ["strict", "fenced", "python", "wrapped", "truncated"])
def test_every_question_is_a_turn_about_its_own_document(settings_of, run, tmp_path, style):
    """An answer that lands at another document's question teaches to make things up."""
    with serving(Writer(style)) as server:
        summary = run(settings_of("one_detail_book"), server)
    found = samples(tmp_path / "out")
    assert len(found) == summary["samples"]["written"] == 6
    asked = 0
    for sample in found:
        turns = sample["conversations"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        days = days_in(turns[0]["content"])
        pairs = {question(day): answer(day) for day in days}
        first, *others = [turn["content"] for turn in turns[::2]]
        questions = [first.rpartition("\n\n")[2], *others]
        assert [pairs[each] for each in questions] == [turn["content"] for turn in turns[1::2]]
        assert not any(is_known(day) for day in days if question(day) in questions)
        assert len(sample["depths"]) == len(questions) and sample["length"] <= 2048
        asked += len(questions)
    assert asked == summary["questions"]["in samples"] > 20
    assert summary["questions"]["known without the document"] > 0
    expected = {
        "strict": set(),
        "fenced": {"fence"},
        "python": {"quotes"},
        "wrapped": {"list inside an object"},
    }
    assert set(summary["repairs"]) == expected.get(style, {"cut off"})
    known = [line for line in rejected(tmp_path / "out") if line["reason"] == "known without the document"]
    assert len(known) == summary["questions"]["known without the document"]
    assert (tmp_path / "out" / "depth.png").read_bytes().startswith(b"\x89PNG")


def test_all_sets_train_two_steps(settings_of, run, student, texts, tmp_path):
    """What is written must be what `train` reads: masks, template, length."""
    for name in SETS:
        with serving(Writer()) as server:
            # Documents are in one set each, so every set gets texts of its own.
            own = tmp_path / f"{name}.jsonl"
            first = 10 * (1 + SETS.index(name))
            write_documents(own, [document(number) for number in range(first, first + 3)])
            changes = {"sections_per_request": 2} if name == "multi_detail_book" else {}
            summary = run(settings_of(name, inputs=[own], **changes), server, tmp_path / name)
        assert summary["samples"]["written"] == 3, summary
    config = {
        "seed": 1,
        "model": {
            "hf_config": {
                "model_type": "llama",
                "vocab_size": student.tokenizer.vocab_size,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 2048,
            },
        },
        "tokenizer": str(student.tokenizer.path.parent),
        "stages": [
            {
                "name": "sft",
                "context_length": 2048,
                "steps": 2,
                "batch_tokens": 2048,
                "lr": 0.01,
                "objective": "sft",
                "max_epochs": 10,
                "streams": {
                    "synth": {
                        "records": [f"{name}/train.jsonl" for name in SETS],
                        "chat_template": "qwen",
                        "pack": {"strategy": "best_fit"},
                    }
                },
            }
        ],
    }
    train(TrainConfig.from_dict(config), tmp_path / "run", data_root=tmp_path)
    losses = [line["loss"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 2 and losses[1] < losses[0]
    # The recorded length is that of the ids that are trained.
    for name in SETS:
        for sample in samples(tmp_path / name):
            assert len(student.chat.encode(sample["conversations"]).ids) == sample["length"]


def test_sections_compared_and_people_say_what_was_dropped(settings_of, run, tmp_path):
    with serving(Writer()) as server:
        settings = settings_of("multi_detail_book", sections_per_request=2)
        compared = run(settings, server, tmp_path / "multi")
        with pytest.raises(DataError, match="6 used by another set"):
            run(settings_of("bio_book"), server, tmp_path / "bio")
        people = run(settings_of("bio_book", inputs=[_other(tmp_path)]), server, tmp_path / "bio")
    assert compared["questions"]["needs fewer than two sections"] == 12
    for sample in samples(tmp_path / "multi"):
        assert all(len(depths) == 2 and depths[0] < depths[1] for depths in sample["depths"])
        assert all(len(set(sections)) == 2 for sections in sample["sections"])
    assert people["questions"]["character not in the document"] == 2
    first = samples(tmp_path / "bio")[0]["conversations"]
    assert any("biography of Clara Finch" in turn["content"] for turn in first[::2])


def _other(tmp_path: Path) -> Path:
    path = tmp_path / "other.jsonl"
    write_documents(path, [document(number) for number in (30, 31)])
    return path


def test_fixed_questions_of_papers_are_not_duplicates_of_each_other(settings_of, run, tmp_path):
    """The same six questions are asked of every paper; a set-wide filter would leave the first paper alone."""
    with serving(Writer()) as server:
        summary = run(settings_of("paper_questions"), server)
    listed = load_set("paper_questions").fixed_questions
    for sample in samples(tmp_path / "out"):
        asked = [turn["content"].rpartition("\n\n")[2] for turn in sample["conversations"][::2]]
        assert sorted(asked) == sorted(listed)
    assert summary["samples"]["written"] == 6


def test_documents_are_used_once_across_sets(settings_of, run, tmp_path):
    """Two sets on the same books would train the same text twice."""
    hashes = {}
    for name, count in (("one_detail_book", 2), ("bio_book", 2), ("one_detail_paper", None)):
        with serving(Writer()) as server:
            run(settings_of(name, documents=count), server, tmp_path / name)
        hashes[name] = {sample["document"] for sample in samples(tmp_path / name)}
    assert [len(names) for names in hashes.values()] == [2, 2, 2]
    assert len(set.union(*hashes.values())) == 6


def test_the_same_command_again_asks_nothing_and_writes_the_same(settings_of, run, tmp_path):
    """Answers come in another order each time; the files may not."""
    with serving(Writer()) as server:
        settings = settings_of("one_detail_book")
        run(settings, server)
        before = len(server.asked)
        whole = (tmp_path / "out" / "train.jsonl").read_bytes()
        assert run(settings, server)["samples"]["written"] == 6
        assert len(server.asked) == before
        (tmp_path / "out" / "COMPLETE").unlink()
        run(settings, server)
        assert len(server.asked) == before, "every answer is recorded"
        assert (tmp_path / "out" / "train.jsonl").read_bytes() == whole
        with pytest.raises(ConfigError, match="leak_check was True, is False"):
            run(settings.model_copy(update={"leak_check": False}), server)


def test_a_second_process_does_not_pay_for_the_same_again(settings_of, run, tmp_path):
    """Two commands at once asked everything twice, and one of them removed the other's half-written files."""
    settings, said = settings_of("one_detail_book"), []
    writer = Writer()

    def script(asked):
        if not said:
            said.append("")
            with pytest.raises(RunError) as error:
                run(settings, server)
            said[0] = str(error.value)
        return writer(asked)

    with serving(script) as server:
        assert run(settings, server)["samples"]["written"] == 6
        bodies = [json.dumps(asked.body) for asked in server.asked]
    assert "another job is at work on" in said[0] and len(set(bodies)) == len(bodies)


def test_a_budget_stops_the_job_and_a_larger_one_goes_on(settings_of, run, tmp_path):
    with serving(Writer()) as server:
        settings = settings_of("one_detail_book")
        with pytest.raises(RunError, match="max_requests is reached"):
            run(settings, server, budget=SpendingLimits(max_requests=5))
        assert len(server.asked) == 5
        assert not (tmp_path / "out" / "train.jsonl").exists()
        summary = run(settings, server)
    prompts = [json.dumps(one.body) for one in server.asked]
    assert len(set(prompts)) == len(prompts), "nothing is asked twice"
    assert summary["samples"]["written"] == 6


def test_requests_without_an_answer_are_counted(settings_of, run, tmp_path):
    """Refusals, empty choices and sections beyond the window are reasons, not crashes, and the rest goes on."""
    writer = Writer()

    def script(asked):
        prompt = asked.body["messages"][0]["content"]
        if "On day 1001 " in prompt:
            return chat("no", finish="content_filter")
        if "On day 2001 " in prompt:
            return reply_json({"choices": []})
        if "On day 3001 " in prompt:
            return error(400, "maximum context length is 10 tokens")
        if "On day 4001 " in prompt:
            return error(400, "I do not like it")
        if "On day 5001 " in prompt:
            return chat("I cannot find anything to ask about.")
        return writer(asked)

    with serving(script) as server:
        summary = run(settings_of("one_detail_book"), server)
    requests = summary["requests"]
    assert {requests[name] for name in ("refused", "no answer", "too long", "rejected")} == {1}
    assert summary["questions"]["reply: no JSON"] == 1
    reasons = [line["reason"] for line in rejected(tmp_path / "out")]
    assert {"request: refused", "request: too long", "reply: no JSON"} <= set(reasons)
    assert summary["samples"]["written"] == 6


def test_documents_longer_than_the_window_are_not_sent(settings_of, run):
    with serving(Writer()) as server:
        summary = run(settings_of("bio_book"), server, endpoint={"max_length": 4500})
        assert summary["requests"] == {"too long": 6} and not server.asked
        with pytest.raises(RunError, match=r"0 samples came out(.|\n)*6 too long"):
            require_samples(summary)


def test_failed_requests_are_asked_again_by_the_next_run(settings_of, run, tmp_path):
    down = {"now": True}
    writer = Writer()

    def script(asked):
        prompt = asked.body["messages"][0]["content"]
        return error(500) if down["now"] and "On day 1001 " in prompt else writer(asked)

    settings = settings_of("one_detail_book")
    with serving(script) as server:
        summary = run(settings, server)
        assert summary["failed"] == 1 and not (tmp_path / "out" / "COMPLETE").exists()
        with pytest.raises(RunError, match="1 requests failed for now"):
            require_samples(summary)
        before, down["now"] = len(server.asked), False
        again = run(settings, server)
    assert again["failed"] == 0 and (tmp_path / "out" / "COMPLETE").exists()
    # The section that failed, and the leak checks of its questions.
    assert 1 < len(server.asked) - before <= 5
    assert again["questions"]["in samples"] > summary["questions"]["in samples"]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (error(401, "Incorrect API key provided"), "refuses the key"),
        (error(404, "The model `m` does not exist", "model_not_found"), "has no model 'm'"),
    ],
)
def test_a_wrong_key_or_model_is_one_message_and_leaves_nothing_in_the_way(
    settings_of, run, tmp_path, reply, message
):
    """The folder of the first try may not refuse the mended command."""
    with serving([reply]) as server, pytest.raises(UserError, match=message):
        run(settings_of("one_detail_book", model="openai:wrong"), server)
    assert len(server.asked) <= 4
    with serving(Writer()) as server:
        assert run(settings_of("one_detail_book", model="openai:right"), server)["samples"]["written"] == 6


def test_filters_count_what_they_leave_out(settings_of, run, tmp_path):
    german = "Der Mann ging mit der Frau in die Stadt, und es war nicht das Ende der Geschichte. " * 20
    path = tmp_path / "mixed.jsonl"
    lines = [
        {"text": document(7)},
        {"text": document(7).replace(" ", "\n")},  # the same but for white space
        {"text": "Short and in English, and that is all there is to it."},
        {"text": document(8, 400)},
        {"text": german},
        {"text": "0101 " * 300},
    ]
    broken = '{"text": "cut o\n{"text": ""}\n'
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + broken)
    with serving(Writer()) as server:
        summary = run(settings_of("one_detail_book", inputs=[path]), server)
    assert summary["documents"] == {
        "read": 6,
        "given twice": 1,
        "too short": 1,
        "too long": 1,
        "language: de": 1,
        "language: unknown": 1,
        "cannot be read": 2,
        "chosen": 1,
    }
    assert samples(tmp_path / "out")[0]["document"] == content_hash(document(7))


def test_inputs_that_no_filter_lets_pass_leave_no_folder_in_the_way(settings_of, run, tmp_path):
    with serving(Writer()) as server:
        with pytest.raises(DataError, match=r"no document is fit(.|\n)*6 too short(.|\n)*--min-tokens"):
            run(settings_of("one_detail_book", min_tokens=4000), server)
        with pytest.raises(DataError, match="nowhere"):
            run(settings_of("one_detail_book", inputs=[tmp_path / "nowhere"]), server)
        assert run(settings_of("one_detail_book"), server)["samples"]["written"] == 6


@pytest.mark.parametrize(
    ("name", "digits"), [("offline", r"\d{5}"), ("offline_sentences", r"The magic .* \d{5}\.")]
)
def test_offline_asks_nobody_and_knows_its_answers(settings_of, run, tmp_path, name, digits):
    """Every answer stands where the sample says, in documents of any length, short ones among others."""
    settings = settings_of(name, sample={"length": 1000, "distractors": 3, "max_questions": 6})
    summary = run(settings, None)
    assert summary["client"] is None and summary["questions"]["planted facts"] > 30
    for sample in samples(tmp_path / "out"):
        context = sample["conversations"][0]["content"]
        for asked, reply in zip(sample["conversations"][::2], sample["conversations"][1::2]):
            assert reply["content"] in context
            assert asked["content"].endswith(("?", "."))
            if "magic number" in asked["content"].rpartition("\n")[2]:
                assert re.fullmatch(digits, reply["content"])
        assert 750 < sample["length"] <= 1000
    counts = summary["depth"]["counts"]
    assert sum(counts) >= 30 and max(counts) - min(counts) <= 4


def test_offline_questions_have_one_answer_among_other_documents(settings_of, run, tmp_path):
    """All papers have a "# Methods", and all books here an Ada Stone: the first one of the sample was another
    document's."""
    path = tmp_path / "papers.jsonl"
    texts = []
    for number in range(40, 46):
        parts = document(number, 24).strip().split("\n\n")
        heads = ["# Introduction", "# Methods", f"# Findings {number}", "# Outlook"]
        texts.append(
            "\n\n".join(f"{heads[n // 2]}\n{part}" if n % 2 == 0 else part for n, part in enumerate(parts))
        )
    write_documents(path, texts)
    settings = settings_of("offline", inputs=[path], sample={"length": 3000, "distractors": 2})
    summary = run(settings, None)
    assert summary["questions"]["asks about another document of the sample too"] > 5
    asked = [
        (sample["conversations"][0]["content"], turn["content"])
        for sample in samples(tmp_path / "out")
        for turn in sample["conversations"][::2]
    ]
    assert len(asked) > 20
    for context, turn in asked:
        last = turn.rsplit("\n", 1)[-1]
        if "Which heading" in last:
            assert context.count("# " + last.split('"')[1]) == 1
        assert "Quote the sentence" not in last, "every name is in every document"


def test_of_a_document_longer_than_a_sample_only_one_window_is_asked_about(settings_of, run, tmp_path):
    """Sections far apart are never in one window, and questions on what no sample holds are paid for nothing."""
    path = tmp_path / "long.jsonl"
    write_documents(path, [document(number, 140) for number in (50, 51, 52)])
    for name in ("one_detail_book", "multi_detail_book"):
        changes = {"sections_per_request": 3} if name == "multi_detail_book" else {}
        settings = settings_of(name, inputs=[path], sample={"length": 1500}, leak_check=False, **changes)
        with serving(Writer()) as server:
            summary = run(settings, server, tmp_path / "same")
        assert summary["samples"]["written"] == 3
        assert summary["questions"]["in samples"] >= 0.7 * (3 * 4 * 4 if name == "one_detail_book" else 3)
        assert len(server.asked) <= 3 * 6
        for file in (tmp_path / "same").iterdir():
            file.unlink()
