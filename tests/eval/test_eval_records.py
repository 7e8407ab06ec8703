from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longspan.core.errors import ArgumentError, ConfigError, DataError, RunError
from longspan.eval.records import RecordsWriter, make_header, read_records, sample_id

MODEL_INFO = {"path": "a", "fingerprint": "f", "rope": {"rope_type": "default"}, "trained_length": 256}


def header(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"tokenizer": "t", "seed": 0, "params": {"lengths": (128, 256), "samples": 2}}
    return make_header("needle", "before", **{"model_info": MODEL_INFO, **settings, **changes})


def test_round_trip(records: Path) -> None:
    """What is written is what the report reads; only a finished file counts as complete."""
    head = header()
    with RecordsWriter(records, head) as writer:
        writer.write({"kind": "sample", "id": "a", "score": 1.0})
        assert not read_records(records).complete
        writer.finish()
    found = read_records(records)
    assert found.header == head
    assert found.samples == [{"kind": "sample", "id": "a", "score": 1.0}]
    assert found.complete


def test_same_evaluation_goes_on_and_a_finished_one_is_left_alone(records: Path) -> None:
    """A second footer or header would make the file unreadable."""
    with RecordsWriter(records, header()) as writer:
        writer.write({"kind": "sample", "id": "a"})
    with RecordsWriter(records, header()) as writer:
        assert list(writer.recorded) == ["a"]
        writer.finish()
    whole = records.read_bytes()
    with RecordsWriter(records, header()) as writer:
        writer.finish()
    assert records.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"tokenizer": "u"}, "tokenizer"),
        ({"params": {"lengths": (128, 512), "samples": 2}}, "params.lengths"),
        ({"model_info": {**MODEL_INFO, "rope": {"rope_type": "linear"}}}, "model.rope.rope_type"),
        ({"model_info": {**MODEL_INFO, "fingerprint": "0"}}, "model.fingerprint"),
        ({"model_info": {**MODEL_INFO, "extra": None}}, r"model.extra \(file: absent, now: null\)"),
        ({"model_info": {**MODEL_INFO, "extra": {}}}, r"model.extra \(file: absent, now: \{\}\)"),
        (
            {"params": {"lengths": (128, 256), "samples": 2, "prompt": f"{'x' * 90} and then {'y' * 90}"}},
            r"params.prompt \(file: absent, now: \"x{59}\.\.\.\)",
        ),
        ({"seed": 0.0}, r"seed \(file: 0, now: 0.0\)"),
    ],
)
def test_other_settings_refuse_to_continue(records: Path, changes: dict[str, Any], named: str) -> None:
    """Results of two models or grids in one file would be averaged together; null, {} and 0.0 were not named."""
    RecordsWriter(records, header()).__exit__(None, None, None)
    before = records.read_bytes()
    with pytest.raises(ConfigError, match=named):
        RecordsWriter(records, header(**changes))
    assert records.read_bytes() == before
    assert sample_id(header(), 128, 0.5, 0) != sample_id(header(**changes), 128, 0.5, 0)


def test_long_settings_are_shown_where_they_differ(records: Path) -> None:
    """Two prompts that begin alike were shown by their beginnings, as if nothing differed."""
    prompts = [f"{'x' * 200} {word} {'y' * 200}" for word in ("old", "new")]
    first, second = (header(params={"lengths": (128,), "prompt": prompt}) for prompt in prompts)
    RecordsWriter(records, first).__exit__(None, None, None)
    with pytest.raises(ConfigError, match=r"file: \.\.\.x+ old y+\.\.\., now: \.\.\.x+ new y+\.\.\."):
        RecordsWriter(records, second)


def test_moved_model_folder_is_the_same_model(records: Path) -> None:
    """A run folder that was moved must still be resumable; the weights' fingerprint identifies the model."""
    with RecordsWriter(records, header()) as writer:
        recorded = writer.recorded
    moved = header(model_info={**MODEL_INFO, "path": "elsewhere"}, note="moved")
    with RecordsWriter(records, moved) as writer:
        assert writer.recorded == recorded


@pytest.mark.parametrize(
    "content",
    [b"", b'{"kind": "sample", "id": "a"}\n', b'{"kind": "header"}\n', b"not json\n", b"[1]\n"],
)
def test_other_files_are_refused_when_read(records: Path, content: bytes) -> None:
    """A wrong path must not look like an evaluation without samples."""
    records.write_bytes(content)
    with pytest.raises(DataError, match=r"needle-before\.jsonl"):
        read_records(records)


def test_foreign_file_is_not_appended_to(records: Path) -> None:
    """An existing file of another kind must survive a wrong --out."""
    records.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(DataError, match="not an evaluation records file"):
        RecordsWriter(records, header())
    assert records.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("text", ["notes without a new line", '{"a": 1}', '{"kind": "sample"'])
def test_foreign_line_is_not_taken_for_a_torn_one(records: Path, text: str) -> None:
    """Cutting off the only line of a file that --out names by mistake empties it."""
    records.write_text(text)
    with pytest.raises(DataError, match="not an evaluation records file"):
        RecordsWriter(records, header())
    assert records.read_text() == text


def test_torn_header_is_written_anew(records: Path) -> None:
    """A process that is killed in its first line must not need a hand to go on."""
    records.write_text(json.dumps(header())[:40])
    with RecordsWriter(records, header()) as writer:
        writer.finish()
    assert read_records(records).complete


def test_second_evaluation_of_the_same_file_is_refused(records: Path) -> None:
    """Both would find the same samples missing, ask for all of them, and record them twice."""
    with RecordsWriter(records, header()) as first:
        first.write({"kind": "sample", "id": "a", "unscored": "why"})
        with pytest.raises(RunError, match="another process writes"):
            RecordsWriter(records, header())
    with RecordsWriter(records, header(), retry_unscored=True) as again:
        assert not again.recorded
        with pytest.raises(RunError, match="another process writes"):
            RecordsWriter(records, header())


def test_sample_without_id_is_named(records: Path) -> None:
    """An edited file must not resume as if the sample were missing."""
    records.write_text(json.dumps(header()) + "\n" + '{"kind": "sample"}\n')
    with pytest.raises(DataError, match="sample 1 has no id"):
        RecordsWriter(records, header())


def test_model_info_has_to_be_whole() -> None:
    """A record without the effective RoPE cannot be compared with another."""
    with pytest.raises(ArgumentError, match="rope"):
        header(model_info={"path": "model", "fingerprint": "f", "trained_length": 256})
