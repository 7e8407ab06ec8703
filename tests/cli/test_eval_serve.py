"""A real server, started by an evaluation: what it writes is what the model writes here."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.core.errors import ArgumentError, DataError
from longspan.eval.records import read_records
from longspan.infer.config import AnswererConfig
from longspan.steps.opening import find_tokenizer


def test_a_gguf_file_has_the_tokenizer_of_its_folder(model: Path, tmp_path: Path) -> None:
    """One message told to name the folder, the next one to name the file."""
    file = model / "model-f16.gguf"
    file.write_bytes(b"GGUF")
    found = find_tokenizer(AnswererConfig(model=str(file), serve="llama.cpp"))
    assert found.vocab_size == find_tokenizer(AnswererConfig(model=str(model))).vocab_size
    with pytest.raises(ArgumentError, match="is a file, not a model"):
        find_tokenizer(AnswererConfig(model=str(file)))
    lonely = tmp_path / "alone" / "model.gguf"
    lonely.parent.mkdir()
    lonely.write_bytes(b"GGUF")
    with pytest.raises(DataError, match=r"has no tokenizer.json(.|\n)*--tokenizer"):
        find_tokenizer(AnswererConfig(model=str(lonely), serve="llama.cpp"))


@pytest.mark.slow
def test_a_served_model_answers_as_it_does_here(longspan, model, tmp_path):
    """A server that is told less than the model needs writes other text than the model does."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: pip install -e '.[dev]'")
    found = {}
    for name, more in (("here", []), ("served", ["--serve", "transformers"])):
        out = tmp_path / name
        options = [
            "--lengths",
            "256",
            "--depths",
            "0,1",
            "--samples",
            "1",
            "--max-new-tokens",
            "6",
            "--bos",
            "never",
        ]
        outcome = longspan(["eval", "passkey", "--model", str(model), "--out", str(out), *options, *more])
        assert outcome.code == 0, outcome.err
        (records,) = Path(out / "records").glob("*.jsonl")
        found[name] = read_records(records)
    assert [s["output"] for s in found["served"].samples] == [s["output"] for s in found["here"].samples]
    model = found["served"].header["model"]
    assert model["backend"] == "transformers" and model["version"] and model["kv_dtype"] == "auto"
