"""Real mosaicml-streaming reads what we write, raw and packed, and we read what it writes.

It needs an old numpy, an old transformers and torchvision, so it lives in an environment of its own:
LONGSPAN_STREAMING_PYTHON names the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from longspan.data.packed.materialize import materialize
from longspan.data.packed.packed_rows import PackedRows
from longspan.data.store import MDSDirectory
from tests.data.test_materialize import make_plan, make_store
from tests.patience import PATIENCE_SECONDS

PYTHON = os.environ.get("LONGSPAN_STREAMING_PYTHON")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="LONGSPAN_STREAMING_PYTHON does not name a Python with mosaicml-streaming"
)

READ = """
import json, sys, tempfile
import numpy as np
from streaming import LocalDataset, StreamingDataset
def plain(sample):
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in sample.items()}
local = [plain(sample) for sample in LocalDataset(sys.argv[1])]
streamed = StreamingDataset(local=sys.argv[1], shuffle=False, batch_size=1)
assert [plain(streamed[i]) for i in range(len(local))] == local
json.dump(local, sys.stdout)
"""

WRITE = """
import sys
import numpy as np
from streaming import MDSWriter
columns = {"domain": "str", "indices": "ndarray:uint32", "input_ids": "ndarray:uint32", "length": "int"}
with MDSWriter(out=sys.argv[1], columns=columns, compression=sys.argv[2] or None, size_limit=1000) as writer:
    for number in range(20):
        ids = np.arange(32, dtype=np.uint32) + number
        indices = np.array([[0, 10], [10, 32]], np.uint32)
        writer.write({"domain": "book", "indices": indices, "input_ids": ids, "length": 32})
"""


def run(program: str, *arguments: object) -> str:
    """Run a program in the other environment and return what it prints."""
    assert PYTHON
    command = [PYTHON, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain(sample: dict) -> dict:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in sample.items()
    }


def test_it_reads_our_token_store(tmp_path: Path) -> None:
    """Columns, offsets and array headers of every width are what the format's own reader expects."""
    for vocab_size in (50_000, 130_000):
        path = tmp_path / str(vocab_size)
        store = make_store(path, [3, 300, 70_000, 1], vocab_size=vocab_size, masks=True)
        found = json.loads(run(READ, path))
        assert [sample["input_ids"] for sample in found] == [
            store.tokens(d).tolist() for d in range(len(store))
        ]
        assert [sample["domain"] for sample in found] == [store.source(d) for d in range(len(store))]
        assert found == [plain(sample) for sample in MDSDirectory(path)]


def test_it_reads_our_packed_rows(tmp_path: Path) -> None:
    """ProLong's loader sits on it: input_ids, indices, mask and length of each row."""
    store = make_store(tmp_path / "store", [50, 3, 120, 64] * 5, masks=True)
    loader = make_plan(tmp_path / "plan", [store], length=64, remainder="pad", specials="both")
    materialize(tmp_path / "plan", tmp_path / "rows", piece_bytes=1000)
    found = json.loads(run(READ, tmp_path / "rows"))
    assert len(found) == loader.num_rows
    for index, sample in enumerate(found):
        row = loader.row(index)
        assert sample["input_ids"] == row.input_ids.tolist() and sample["mask"] == row.weights.tolist()
        assert sample["length"] == 64
        bounds = [[a, b] for a, b in zip(row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist())]
        real = [source != "padding" for source in (row.source_names[s] for s in row.sources)]
        assert sample["indices"] == [bound for bound, keep in zip(bounds, real) if keep]


@pytest.mark.parametrize("compression", ["", "zstd:7"])
def test_we_read_its_packed_rows(tmp_path: Path, compression: str) -> None:
    """Shards as datatools writes them, compressed too."""
    run(WRITE, tmp_path / "rows", compression)
    rows = PackedRows(tmp_path / "rows")
    assert (rows.num_rows, rows.length) == (20, 32)
    row = rows.row(13)
    assert row.input_ids.tolist() == list(range(13, 45)) and row.cu_seqlens.tolist() == [0, 10, 32]
