"""Records as recipes name them: texts and conversations, drawn, limited, grouped by length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import ConfigError, DataError
from longspan.data.packed.materialize import materialize
from longspan.data.tokenizer import load_tokenizer, train_bpe
from longspan.train.config import StageConfig
from longspan.train.left_out import left_out_words
from longspan.train.record_files import Records, parse_records
from longspan.train.streams import StagePlan, grouped_by_length, plan_stage

SPECIAL = ("<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    texts = [f"text {number} " + "word " * (3 * number) for number in range(1, 21)]
    train_bpe(texts, folder / "tokenizer", vocab_size=300, special_tokens=SPECIAL)
    (folder / "texts.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"answer {number}"}]
        for number, text in enumerate(texts)
    ]
    (folder / "chats.json").write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats))
    (folder / "other.json").write_text('{"question": "?"}\n')
    return folder


def planned(root: Path, stream: dict[str, Any], **stage: Any) -> StagePlan:
    settings = {
        "name": "s", "context_length": 128, "epochs": 1, "batch_tokens": 128, "lr": 0.1,
        "streams": {"mine": {"strategy": "best_fit", **stream}}, **stage,
    }  # fmt: skip
    return plan_stage(
        StageConfig.from_dict(settings), data_root=root, seed=5, tokenizer=load_tokenizer(root / "tokenizer")
    )


def documents(plan: StagePlan) -> list[int]:
    rows = [plan.sources["mine"].row(index) for index in range(plan.sources["mine"].num_rows)]
    found = np.concatenate([row.documents[~row.continuation] for row in rows])
    return sorted(found[found != 2**32 - 1].tolist())


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ("a.json", ("a.json", None, False)),
        ("long-llm:a.json[5000]", ("long-llm:a.json", 5000, False)),
        ("a[1].json[:20]", ("a[1].json", 20, True)),
        ("a.json[2e3]", ("a.json", 2000, False)),
    ],
)
def test_entries_are_read(entry: str, parts: tuple[str, int | None, bool]) -> None:
    """A bracket inside the name is part of it; only the last one counts records."""
    assert parse_records(entry) == Records(*parts)


@pytest.mark.parametrize("entry", ["a[]", "a[0]", "a[-1]", "a[1.5]", "a[:]"])
def test_a_number_that_is_none_is_refused(entry: str) -> None:
    """An empty pair of brackets once meant a crash deep inside."""
    with pytest.raises(ConfigError, match="number in brackets"):
        parse_records(entry)


def test_draws_are_of_the_asked_size_and_the_same_each_time(root: Path) -> None:
    """A sample that changes with each start would make a resumed run read other data."""
    first = documents(planned(root, {"records": "texts.json[7]"}))  # one file needs no list
    assert len(set(first)) == 7 and first != list(range(7))
    assert documents(planned(root, {"records": ["texts.json[7]"]})) == first
    assert documents(planned(root, {"records": ["texts.json[:7]"]})) == list(range(7))
    assert len(documents(planned(root, {"records": ["texts.json[500]"]}))) == 20


def test_the_same_file_twice_counts_twice(root: Path) -> None:
    """Entries that are kept by path collapse into the last one."""
    plan = planned(root, {"records": ["texts.json[3]", "texts.json[4]"]})
    assert len(documents(plan)) == 7


def test_the_prefix_is_the_data_root_and_only_a_prefix(root: Path) -> None:
    """Paths of the published command line work from any folder."""
    assert documents(planned(root, {"records": ["long-llm:texts.json"]})) == list(range(20))
    with pytest.raises(DataError, match="long-llm:texts"):
        planned(root, {"records": ["long-llm:long-llm:texts.json"]})


def test_conversations_learn_the_answers_alone(root: Path) -> None:
    """sft on records needs the mask that the chat template gives; texts beside them are learnt whole."""
    plan = planned(root, {"records": ["chats.json"], "chat_template": "llama-3"}, objective="sft")
    row = plan.mixer.rows(0, 1)[0] if plan.mixer else None
    assert row is not None and 0 < int(row.weights.sum()) < len(row.weights) // 2
    both = planned(
        root, {"records": ["chats.json", "texts.json"], "chat_template": "llama-3"}, objective="sft"
    )
    assert len(documents(both)) == 40
    with pytest.raises(ConfigError, match="has no masks"):
        planned(root, {"records": ["texts.json"]}, objective="sft")


def test_one_record_of_another_shape_ends_no_training(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first record decided what a file holds, and a last one without a line end was no record."""
    texts = (root / "texts.json").read_bytes()
    (root / "mixed.json").write_bytes(b'{"cut\n{"id": 1}\n{"text": 5}\n' + texts.rstrip())
    with caplog.at_level("WARNING"):
        assert len(documents(planned(root, {"records": ["mixed.json"]}))) == 20
    for counted in ("1 broken records", "1 records without", "1 records with a field of another type"):
        assert counted in caplog.text
    (root / "one.json").write_text(json.dumps({"text": "word " * 20}))
    assert len(documents(planned(root, {"records": ["one.json"]}))) == 1


def test_lm_learns_every_token_of_conversations_unless_told(root: Path) -> None:
    """A mask that `lm` applies in silence is another loss than the one that is asked for; padding is learnt by none.
    Packed rows know from their manifest, or as others wrote them, that their mask is one of answers."""
    chats = {"records": ["chats.json"], "chat_template": "llama-3"}

    def learnt(stream: dict[str, Any], **stage: Any) -> list[int]:
        plan = planned(root, stream, **stage)
        rows = next(iter(plan.sources.values()))
        return [int(rows.row(number).weights.sum()) for number in range(rows.num_rows)]

    answers, all_tokens = learnt(chats, objective="sft"), learnt(chats)
    assert sum(answers) < sum(all_tokens)
    assert learnt({**chats, "loss_mask": True}) == answers == learnt(chats, loss_mask=True)
    assert learnt({**chats, "loss_mask": False}, objective="sft") == all_tokens
    rows = next(iter(planned(root, chats, objective="sft").sources.values()))
    rows.plan.save(root / "plan", stores=[next((root / "stores").glob("chats-*"))])
    materialize(root / "plan", root / "rows", format="jsonl")
    (root / "foreign.jsonl").write_bytes((root / "rows" / "rows.00000.jsonl").read_bytes())
    for packed in ("rows", "plan", "foreign.jsonl"):
        assert learnt({"rows": packed, "strategy": None}, objective="sft") == answers, packed
        assert learnt({"rows": packed, "strategy": None}) == all_tokens, packed
    weighted = {"text": "text " * 90, "loss_weights": [[0, 4, 200]]}
    (root / "weighted.json").write_text(json.dumps(weighted) + "\n")
    assert max(learnt({"records": ["weighted.json"]})) > 200, "weights that a text carries count"


def test_messages_are_read_as_tokenize_reads_them(root: Path) -> None:
    """Records of `messages` were refused, though `longspan data tokenize` makes stores of them."""
    turns = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2", "weight": 0}]
    turns += [{"role": "user", "content": "three?"}, {"role": "assistant", "content": "3"}]
    lines = [{"messages": turns}, {"messages": json.dumps(turns)}, {"messages": "no"}, {"text": "x"}]
    (root / "messages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = planned(root, {"records": ["messages.jsonl"], "chat_template": "llama-3"}, objective="sft")
    assert documents(plan) == [0, 1]
    row = plan.sources["mine"].row(0)
    trained = row.input_ids[row.weights > 0]
    assert len(trained) == 4, "a 3 and its end, twice"


def test_conversations_stay_whole_unless_asked(root: Path) -> None:
    """A conversation cut at a row's end teaches an answer to a question that the model does not see."""
    chats = {"records": ["chats.json"], "chat_template": "llama-3", "strategy": None}
    plan = planned(root, chats, objective="sft", context_length=64)
    rows = [plan.sources["mine"].row(index) for index in range(plan.sources["mine"].num_rows)]
    assert not any(row.continuation.any() for row in rows)
    assert 0 < plan.left_out["mine"]["long"] == 20 - len(documents(plan)) < 20
    cut = planned(root, {**chats, "strategy": "concat"}, objective="sft", context_length=64)
    assert cut.left_out["mine"]["cut_chats"] > 0 and cut.left_out["mine"]["long"] == 0
    # Texts go on as before.
    texts = planned(root, {"records": ["texts.json"], "strategy": None})
    assert texts.left_out["mine"]["cut_chats"] == 0 and any(
        texts.sources["mine"].row(index).continuation.any() for index in range(texts.sources["mine"].num_rows)
    )


@pytest.mark.parametrize("strategy", [None, "concat", "intact"])
def test_an_epoch_counts_every_token(root: Path, strategy: str | None) -> None:
    """An epoch of 50 chats trained 2,048 of 2,764 tokens, and nothing was said to be left out."""
    stream = {"records": ["chats.json"], "chat_template": "llama-3", "strategy": strategy}
    plan = planned(root, stream, objective="sft", batch_tokens=128 * 7)
    assert plan.mixer is not None
    rows = plan.mixer.rows(0, plan.rows_needed["mine"])
    read = sum(int(np.diff(row.cu_seqlens)[row.documents != 2**32 - 1].sum()) for row in rows)
    out = plan.left_out["mine"]
    lengths = plan.sources["mine"]._lengths
    long = int(lengths.tokens[lengths.tokens > 128].sum()) if strategy is None else 0
    assert (out["rest_rows"] > 0, out["tail_tokens"]) == (True, 0), (out, plan.sources["mine"].num_rows)
    assert read + out["rest_tokens"] + long == int(lengths.tokens.sum())
    words = left_out_words(out)
    assert f"{out['rest_rows']} rows that fill no step, {out['rest_tokens']} tokens in those rows" in words


def test_too_long_and_too_short_are_left_out_and_counted(root: Path) -> None:
    """Records that vanish without a count make two data sets look alike."""
    plan = planned(root, {"records": ["texts.json"], "max_document_tokens": 60, "min_document_tokens": 20})
    lengths = plan.mixtures["mine"].report
    out = plan.left_out["mine"]
    assert out["long"] > 0 and out["short"] > 0
    assert len(documents(plan)) == lengths.documents - out["long"] - out["short"]
    # A draw is made from what is left, so that its size is what was asked for.
    drawn = planned(root, {"records": ["texts.json[4]"], "max_document_tokens": 60})
    assert len(documents(drawn)) == 4


def test_other_records_and_a_missing_tokenizer_are_named(root: Path) -> None:
    """A schema of another tool would otherwise train on nothing."""
    with pytest.raises(DataError, match=r"neither texts nor conversations(.|\n)*question"):
        planned(root, {"records": ["other.json"]})
    stage = {"name": "s", "context_length": 8, "steps": 1, "batch_tokens": 8, "lr": 1.0}
    values = {**stage, "streams": {"mine": {"records": ["texts.json"]}}}
    with pytest.raises(ConfigError, match="records need a tokenizer"):
        plan_stage(StageConfig.from_dict(values), data_root=root, seed=0)


def test_grouping_puts_like_lengths_together() -> None:
    """Sorted as a whole, training would begin with all long documents and end with all short ones."""
    tokens = np.array([3, 9, 1, 2, 7])
    found = grouped_by_length(np.array([0, 1, 2, 3, 4]), tokens, stretch=2)
    assert tokens[found].tolist() == [9, 3, 2, 1, 7]


def test_rows_of_a_grouped_stream_are_alike(root: Path) -> None:
    """Packing in an order of its own would undo the grouping."""
    plan = planned(root, {"records": ["texts.json"], "group_by_length": True, "strategy": "intact"})
    rows = [plan.sources["mine"].row(index) for index in range(plan.sources["mine"].num_rows)]
    lengths = [int(row.cu_seqlens[1]) for row in rows if not row.continuation[0]]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 5


def test_streams_by_their_rows_end_together(root: Path) -> None:
    """With equal weights the small stream would be seen several times in an epoch of the large one."""
    streams = {
        "many": {"records": ["texts.json"], "strategy": "intact"},
        "few": {"records": ["chats.json[5]"], "chat_template": "llama-3", "strategy": "intact"},
    }
    plan = planned(root, {}, streams=streams, shares="rows")
    for name, needed in plan.rows_needed.items():
        assert abs(needed - plan.sources[name].num_rows) <= 1
    # By weight the epoch ends with the small stream.
    equal = planned(root, {}, streams=streams)
    assert equal.rows_needed["few"] == equal.sources["few"].num_rows
    assert equal.rows_needed["many"] < equal.sources["many"].num_rows
