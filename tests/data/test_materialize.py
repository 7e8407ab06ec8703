"""Rows written for other tools, and read back: the same rows, the same bytes, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, DataError, RunError
from longspan.data.jobs import ArrayJob, LocalExecutor
from longspan.data.jobs.job_lock import hold_share
from longspan.data.packed import materialize as materializing
from longspan.data.packed.manifest import read_rows_manifest
from longspan.data.packed.materialize import materialize, rows_folder
from longspan.data.packed.packed_rows import PackedRows
from longspan.data.packed.row_formats import FORMATS
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import PAD_DOCUMENT, PackPlan, plan_packing
from longspan.data.rows.loader import PackedRow, RowLoader, StreamMixer, balance
from longspan.data.store import Column, MDSDirectory, MDSWriter, TokenStore, TokenStoreWriter
from longspan.data.store.lengths import LengthTable
from tests.patience import PATIENCE_SECONDS

TOKENIZER = SimpleNamespace(fingerprint="0" * 16, vocab_size=50_000, bos_id=1, eos_id=2, pad_id=3)


def make_store(
    path: Path, tokens: Sequence[int], *, vocab_size: int = 50_000, masks: bool = False, seed: int = 0
) -> TokenStore:
    """Write documents of random ids from 10 on, sources a b c in turn, shards of 2 KB."""
    generator = np.random.default_rng(seed)
    identity = SimpleNamespace(**{**vars(TOKENIZER), "vocab_size": vocab_size})
    with TokenStoreWriter(path, config={}, tokenizer=identity, shard_bytes=2048) as writer:
        for number, count in enumerate(tokens):
            ids = generator.integers(10, vocab_size, count)
            mask = generator.integers(0, 4, count).astype(np.uint8) if masks and number % 2 else None
            writer.add(ids, source="abc"[number % 3], key=1000 * seed + number, mask=mask)
    return TokenStore(path)


def make_plan(path: Path, stores: list[TokenStore], **values: object) -> RowLoader:
    """Pack all documents, save the plan and return its loader."""
    lengths = LengthTable.concatenate([store.lengths for store in stores])
    spec = PackConfig.from_dict({"bos_id": 1, "eos_id": 2, "pad_id": 3} | values)
    plan = plan_packing(spec, lengths, np.arange(len(lengths), dtype=np.uint32), 1)
    plan.save(path, stores=[store.path.absolute() for store in stores])
    return RowLoader(stores, PackPlan.load(path))


def parts(row: PackedRow) -> dict[str, list | None]:
    """Return a row as plain lists, sources by name."""
    found = {
        name: None if value is None else value.tolist()
        for name, value in row._asdict().items()
        if name not in ("source_names", "sources")
    }
    return found | {"sources": [row.source_names[source] for source in row.sources.tolist()]}


def tree_hash(folder: Path) -> str:
    """Return a hash over the names and bytes of all files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


SPECS = [
    {"length": 64},
    {"length": 33, "specials": "both", "remainder": "pad"},
    {"length": 64, "specials": "eos", "overlap": 7, "mos_id": 4, "remainder": "pad"},
    {"length": 128, "strategy": "best_fit", "remainder": "pad", "specials": "bos"},
    {"length": 64, "strategy": "split", "split_lengths": [64, 16], "piece_length": 16, "by_source": True},
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("spec", SPECS, ids=[str(number) for number in range(len(SPECS))])
@pytest.mark.parametrize("masks", [False, True])
def test_rows_come_back(tmp_path: Path, format: str, spec: dict, masks: bool) -> None:
    """What is trained on is the same whether rows are read through the plan or from what was written."""
    first = make_store(tmp_path / "one", [5, 300, 64, 1, 700, 63, 2, 90], masks=masks)
    second = make_store(tmp_path / "two", [700, 8], seed=1)
    loader = make_plan(tmp_path / "plan", [first, second], **spec)
    materialize(tmp_path / "plan", tmp_path / "rows", format=format, piece_bytes=600)
    rows = PackedRows(tmp_path / "rows")
    assert (rows.num_rows, rows.length, rows.fingerprint) == (
        loader.num_rows,
        loader.length,
        loader.fingerprint,
    )
    if rows.num_rows > 2:
        assert len(read_rows_manifest(tmp_path / "rows").pieces) > 1
    for index in range(loader.num_rows):
        expected, found = parts(loader.row(index)), parts(rows.row(index))
        if format in ("jsonl", "parquet"):  # these have no place for whose document it is
            for name in ("documents", "continuation"):
                del expected[name], found[name]
        assert found == expected


def test_large_vocabularies_and_long_documents(tmp_path: Path) -> None:
    """Headers of 2, 3 and 5 bytes put ids at any alignment; uint32 stores stay uint32."""
    store = make_store(tmp_path / "store", [3, 70_000, 254, 255, 256, 65_535, 65_536], vocab_size=130_000)
    loader = make_plan(tmp_path / "plan", [store], length=1000)
    materialize(tmp_path / "plan", tmp_path / "rows", format="npy")
    ids = np.load(tmp_path / "rows" / "input_ids.00000.npy")
    assert ids.dtype == np.uint32
    for index in range(loader.num_rows):
        assert np.array_equal(ids[index], loader.row(index).input_ids)


def test_mds_rows_by_hand(tmp_path: Path) -> None:
    """Columns and types are what ProLong's loader and mosaicml-streaming read; padding is in no index."""
    store = make_store(tmp_path / "store", [3, 4])
    make_plan(tmp_path / "plan", [store], length=5, remainder="pad", shuffle=False)
    materialize(tmp_path / "plan", tmp_path / "rows")
    first, second = MDSDirectory(tmp_path / "rows")
    assert first["input_ids"].dtype == np.uint32 and first["indices"].dtype == np.uint32
    assert first["indices"].tolist() == [[0, 3], [3, 5]]
    assert (first["length"], first["domain"], second["domain"]) == (5, "mixed", "b")
    assert second["indices"].tolist() == [[0, 2]]
    assert (second["doc_ids"].tolist(), second["continued"].tolist()) == ([1], [1])
    assert second["input_ids"].tolist()[2:] == [3, 3, 3]


def test_chunks_have_the_packed_slimpajama_form(tmp_path: Path) -> None:
    """`source` spans partition every chunk and `labels` is the one token that follows."""
    store = make_store(tmp_path / "store", [3, 9, 4])
    make_plan(tmp_path / "plan", [store], length=8, shuffle=False)
    materialize(tmp_path / "plan", tmp_path / "rows", format="jsonl")
    (record, last) = map(json.loads, (tmp_path / "rows" / "rows.00000.jsonl").read_text().splitlines())
    assert record["source"] == [{"source": "a", "start": 0, "end": 3}, {"source": "b", "start": 3, "end": 8}]
    assert record["labels"] == store.tokens(1)[5] and last["labels"] == -100
    assert list(record) == ["input_ids", "labels", "source"]


@pytest.fixture(scope="module")
def pools() -> Iterator[list[LocalExecutor]]:
    """Processes that several tests share, opening plan after plan."""
    with LocalExecutor(1) as one, LocalExecutor(3) as three:
        yield [one, three]


@pytest.mark.parametrize("format", FORMATS)
def test_who_writes_leaves_no_trace(tmp_path: Path, pools: list[LocalExecutor], format: str) -> None:
    """The same bytes for one process, for three, and for three jobs of an array in any order; processes
    that wrote another plan before do not write its rows again."""
    store = make_store(tmp_path / "store", [50] * 40)
    for length in (32, 64):
        make_plan(tmp_path / "plan", [store], length=length)
        trees = set()
        for pool in pools:
            out = tmp_path / f"rows{pool.num_workers}-{length}"
            assert rows_folder(tmp_path / "plan", out, format=format, piece_bytes=2000).make(pool)
            trees.add(tree_hash(out))
        for order in ((0, 1, 2), (2, 0, 1)):
            out = tmp_path / f"rows{order[0]}-of-3-{length}"
            work = rows_folder(tmp_path / "plan", out, format=format, piece_bytes=2000)
            assert work.num_pieces > 3
            whole = [work.make(pools[0], ArrayJob(index, 3)) for index in order]
            assert whole == [False, False, True] and work.missing() == 0
            assert work.make(pools[0], ArrayJob(0, 3)), "what is complete is kept"
            trees.add(tree_hash(out))
        assert len(trees) == 1
    assert not list(tmp_path.glob(".*"))


def test_jobs_side_by_side(tmp_path: Path) -> None:
    """Of jobs that end at the same time one makes the whole, and none fails."""
    store = make_store(tmp_path / "store", [50] * 40)
    make_plan(tmp_path / "plan", [store], length=64)
    materialize(tmp_path / "plan", tmp_path / "one", piece_bytes=2000)
    for attempt in range(5):
        work = rows_folder(tmp_path / "plan", tmp_path / f"rows{attempt}", piece_bytes=2000)
        with ThreadPoolExecutor(3) as threads:
            jobs = [threads.submit(work.make, LocalExecutor(), ArrayJob(index, 3)) for index in range(3)]
        assert any(job.result() for job in jobs)
        assert tree_hash(work.out) == tree_hash(tmp_path / "one")


@pytest.mark.slow
def test_ray_writes_the_same(tmp_path: Path) -> None:
    """The cluster is no part of the rows. Starting Ray takes some 10 s."""
    pytest.importorskip("ray", reason="the ray package is not installed")
    store = make_store(tmp_path / "store", [50] * 40)
    make_plan(tmp_path / "plan", [store], length=64)
    materialize(tmp_path / "plan", tmp_path / "one", piece_bytes=2000)
    program = (
        "import sys; from longspan.data.jobs import RayExecutor\n"
        "from longspan.data.packed.materialize import materialize\n"
        "materialize(sys.argv[1], sys.argv[2], executor=RayExecutor(num_workers=2), piece_bytes=2000)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "plan"), str(tmp_path / "ray")]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_SECONDS)
    assert tree_hash(tmp_path / "ray") == tree_hash(tmp_path / "one")


@pytest.mark.parametrize("format", FORMATS)
def test_formats_convert_into_each_other(tmp_path: Path, format: str) -> None:
    """From a packed folder as from its plan: no token, span or weight changes on the way."""
    store = make_store(tmp_path / "store", [50, 3, 120, 64], masks=True)
    loader = make_plan(tmp_path / "plan", [store], length=64, remainder="pad", specials="bos")
    materialize(tmp_path / "plan", tmp_path / "first", format=format)
    materialize(tmp_path / "first", tmp_path / "second", format="mds")
    rows = PackedRows(tmp_path / "second")
    for index in range(loader.num_rows):
        expected, found = parts(loader.row(index)), parts(rows.row(index))
        for name in ("documents", "continuation") if format in ("jsonl", "parquet") else ():
            del expected[name], found[name]
        assert found == expected


KILLED = """
import sys, os, signal
from pathlib import Path
from longspan.data.packed import materialize, row_formats
written = row_formats.write_rows
def write(folder, number, *args, **kwargs):
    if number == 3:
        # Half a file is on the disk when the machine kills the process.
        (Path(folder) / f".{'shard.00003.mds'}.0123abcd.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return written(folder, number, *args, **kwargs)
materialize.write_rows = write
materialize.materialize(sys.argv[1], sys.argv[2], piece_bytes=1000)
"""


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGKILL nothing stands at the place; the next run writes what is missing, to the same bytes."""
    store = make_store(tmp_path / "store", [50] * 40)
    make_plan(tmp_path / "plan", [store], length=64)
    arguments = [str(tmp_path / "plan"), str(tmp_path / "rows")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=PATIENCE_SECONDS)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "rows").exists()
    written = []
    write = materializing.write_rows
    monkeypatch.setattr(
        materializing,
        "write_rows",
        lambda folder, number, *a, **k: written.append(number) or write(folder, number, *a, **k),
    )
    materialize(*arguments, piece_bytes=1000)
    assert written[0] == 3
    monkeypatch.undo()
    materialize(tmp_path / "plan", tmp_path / "undisturbed", piece_bytes=1000)
    assert tree_hash(tmp_path / "rows") == tree_hash(tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_run_killed_at_any_time_goes_on(tmp_path: Path) -> None:
    """With worker processes too, killed after ever longer times until it gets through."""
    store = make_store(tmp_path / "store", [500] * 1000)
    make_plan(tmp_path / "plan", [store], length=64)
    program = (
        "import sys; from longspan.data.packed.materialize import materialize\n"
        "if __name__ == '__main__': materialize(sys.argv[1], sys.argv[2], num_workers=2, piece_bytes=20000)"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "plan"), str(tmp_path / "rows")]
    killed = 0
    for attempt in range(100):
        process = subprocess.Popen(command)
        try:
            process.wait(timeout=0.6 + 0.2 * attempt)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed and process.returncode == 0
    materialize(tmp_path / "plan", tmp_path / "undisturbed", piece_bytes=20_000)
    assert tree_hash(tmp_path / "rows") == tree_hash(tmp_path / "undisturbed")


def test_a_second_job_stops(tmp_path: Path) -> None:
    """Two jobs on one folder would write over each other; other settings would mix two outputs."""
    store = make_store(tmp_path / "store", [50] * 40)
    make_plan(tmp_path / "plan", [store], length=64)
    begun = rows_folder(tmp_path / "plan", tmp_path / "rows", piece_bytes=2000)
    with hold_share(begun.aside, ArrayJob(), what="rows"):
        with pytest.raises(RunError, match="another job"):
            materialize(tmp_path / "plan", tmp_path / "rows")
        with pytest.raises(RunError, match=r"job-0-of-1\.lock is held"):
            begun.make(LocalExecutor(), ArrayJob(1, 3))
    assert begun.make(LocalExecutor(), ArrayJob(1, 3)) is False
    with pytest.raises(DataError, match="unfinished work with other settings"):
        materialize(tmp_path / "plan", tmp_path / "rows")


def test_what_is_there_is_kept_or_refused(tmp_path: Path) -> None:
    """The same rows are not written twice, and other ones never replaced in silence."""
    store = make_store(tmp_path / "store", [50] * 40)
    make_plan(tmp_path / "plan", [store], length=64)
    materialize(tmp_path / "plan", tmp_path / "rows")
    before = (tmp_path / "rows" / "index.json").stat().st_mtime_ns
    materialize(tmp_path / "plan", tmp_path / "rows")
    assert (tmp_path / "rows" / "index.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="other rows"):
        materialize(tmp_path / "plan", tmp_path / "rows", format="npy")
    make_plan(tmp_path / "plan", [store], length=32)
    with pytest.raises(DataError, match="other rows"):
        materialize(tmp_path / "plan", tmp_path / "rows")
    with pytest.raises(DataError, match="not the manifest of packed rows"):
        materialize(tmp_path / "plan", tmp_path / "store")
    with pytest.raises(ArgumentError, match="mds"):
        materialize(tmp_path / "plan", tmp_path / "new", format="csv")


def test_a_store_that_moved_its_documents_is_refused(tmp_path: Path) -> None:
    """Offsets that point into another document give an error, not its tokens."""
    store = make_store(tmp_path / "store", [50] * 40)
    make_plan(tmp_path / "plan", [store], length=64)
    offsets = np.load(tmp_path / "store" / "lengths" / "offset.npy")
    offsets[7] += 2
    np.save(tmp_path / "store" / "lengths" / "offset.npy", offsets)
    with pytest.raises(DataError, match="does not stand where"):
        materialize(tmp_path / "plan", tmp_path / "rows")


def prolong_rows(path: Path) -> None:
    """Write packed rows with the columns of ProLong's data: nothing in them is ours."""
    path.mkdir()
    columns = [
        Column("domain", "str"),
        Column("indices", "ndarray:uint32"),
        Column("input_ids", "ndarray:uint32"),
        Column("length", "int"),
        Column("mask", "ndarray:uint8"),
    ]
    writer = MDSWriter(path, columns, size_limit=400)
    for number in range(6):
        writer.write(
            {
                "domain": "book" if number % 2 else "code",
                "indices": np.array([[0, 3], [3, 7]], np.uint32),
                "input_ids": np.arange(8, dtype=np.uint32) + 10 * number,
                "length": 8,
                "mask": np.array([0, 1] * 4, np.uint8),
            }
        )
    writer.finish()


def test_packed_data_of_prolong_is_read(tmp_path: Path) -> None:
    """Indices become documents, what they leave out is padding, the mask becomes weights."""
    prolong_rows(tmp_path / "rows")
    rows = PackedRows(tmp_path / "rows")
    row = rows.row(3)
    assert (rows.num_rows, rows.length, rows.source_names) == (6, 8, ("code", "book", "padding"))
    assert row.input_ids.tolist() == list(range(30, 38)) and row.input_ids.dtype == np.int64
    assert row.cu_seqlens.tolist() == [0, 3, 7, 8]
    assert [row.source_names[source] for source in row.sources] == ["book", "book", "padding"]
    assert row.weights.tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
    assert row.documents[2] == PAD_DOCUMENT and len({*row.documents, *rows.row(2).documents}) == 5
    mixer = StreamMixer({"packed": (rows, 1.0)}, 3)
    assert [int(found.input_ids[0]) for found in mixer.rows(0, 3)] == [0, 10, 20]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_packed_slimpajama_is_read(tmp_path: Path, suffix: str) -> None:
    """Chunks as published: a scalar label, spans without document identity, several files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "chunks").mkdir()
    for number in range(2):
        spans = [{"source": "Book", "start": 0, "end": 2}, {"source": "ArXiv", "start": 2, "end": 5}]
        records = [{"input_ids": [number, k, 2, 3, 4], "labels": 7, "source": spans} for k in range(3)]
        path = tmp_path / "chunks" / f"part_{number}.{suffix}"
        if suffix == "jsonl":
            path.write_text("\n".join(map(json.dumps, records)))  # the last line has no end, as theirs
        else:
            pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    rows = PackedRows(tmp_path / "chunks")
    assert (rows.num_rows, rows.length) == (6, 5)
    row = rows.row(5)
    assert row.input_ids.tolist() == [1, 2, 2, 3, 4] and row.cu_seqlens.tolist() == [0, 2, 5]
    assert [row.source_names[source] for source in row.sources] == ["Book", "ArXiv"]
    assert PackedRows(tmp_path / "chunks" / f"part_0.{suffix}").num_rows == 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [1, 2]}, "another length"),
        ({"input_ids": "abc"}, "not a packed row"),
        ({"text": "abc"}, "not a packed row"),
        ({"input_ids": [1, 2, 3], "source": [{"source": "a", "start": 2, "end": 9}]}, "overlap or reach"),
        ({"input_ids": [1, 2, 3], "source": [{"source": "a", "start": 2, "end": 2}]}, "overlap or reach"),
        ({"input_ids": [1, -2, 3]}, "not a packed row"),
        ([1], "not a packed row"),
    ],
)
def test_damaged_chunks_are_refused(tmp_path: Path, record: object, message: str) -> None:
    """Spans that reach outside would train on what is not there."""
    good = {"input_ids": [1, 2, 3], "labels": 4, "source": [{"source": "a", "start": 0, "end": 3}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=message):
        PackedRows(tmp_path / "rows.jsonl").row(1)


def test_folders_without_rows_are_refused(tmp_path: Path) -> None:
    """An empty folder, one of other files, and rows that have lost a file."""
    with pytest.raises(DataError, match="not a store of packed rows"):
        PackedRows(tmp_path)
    store = make_store(tmp_path / "store", [50] * 40)
    make_plan(tmp_path / "plan", [store], length=64)
    materialize(tmp_path / "plan", tmp_path / "rows", format="npy", piece_bytes=2000)
    (tmp_path / "rows" / "input_ids.00001.npy").unlink()
    with pytest.raises(DataError, match="incomplete"):
        PackedRows(tmp_path / "rows")
    manifest = json.loads((tmp_path / "rows" / "longspan.json").read_text())
    (tmp_path / "rows" / "longspan.json").write_text(json.dumps(manifest | {"pieces": 3}))
    with pytest.raises(DataError, match="malformed"):
        read_rows_manifest(tmp_path / "rows")


@settings(max_examples=100, deadline=None)
@given(
    costs=st.lists(st.integers(0, 10**6), min_size=1, max_size=40),
    num_ranks=st.integers(1, 6),
)
def test_ranks_finish_together(costs: list[int], num_ranks: int) -> None:
    """Every row is dealt once; ranks differ by no more than the dearest row; columns hold neighbours in cost."""
    costs = costs[: len(costs) // num_ranks * num_ranks]
    dealt = balance(costs, num_ranks)
    assert sorted(dealt.reshape(-1).tolist()) == list(range(len(costs)))
    if costs:
        totals = np.array(costs)[dealt].sum(axis=1)
        assert totals.max() - totals.min() <= max(costs)
        column = np.array(costs)[dealt]
        assert np.all(column.min(axis=0)[:-1] >= column.max(axis=0)[1:])


def test_a_step_is_balanced_by_hand() -> None:
    """9 + 1 and 8 + 2, not 9 + 8 and 1 + 2."""
    assert balance([9, 1, 8, 2], 2).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ArgumentError, match="do not divide"):
        balance([1, 2, 3], 2)
