"""Tokenizing a corpus: the same store whatever the workers, whole after any end, masks on the right tokens."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError, ConfigError, DataError, RunError
from longspan.data.chat import ChatFormat
from longspan.data.jobs import ArrayJob, LocalExecutor
from longspan.data.jobs.job_lock import JobLock
from longspan.data.tokenize import (
    CorpusJob,
    TokenizeConfig,
    document_key,
    encode,
    token_weights,
    tokenize_corpus,
    units,
)
from longspan.data.tokenize import corpus as corpus_module
from longspan.data.tokenizer import Tokenizer, engine, load_tokenizer
from longspan.data.verify import verify
from tests.patience import PATIENCE_SECONDS

Write = Callable[..., Path]


@pytest.fixture
def corpus(texts: list[str], write_jsonl: Write) -> Path:
    """Three files, 60 documents, two of them broken or empty."""
    write_jsonl("corpus/web.jsonl", *({"text": text} for text in texts[:20]), b"{broken", {"text": ""})
    write_jsonl("corpus/book/1.jsonl", *({"text": text + " one"} for text in texts[:30]))
    return write_jsonl("corpus/book/2.jsonl", *({"text": text + " two"} for text in texts[:10])).parent.parent


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_store_holds_the_corpus(corpus: Path, texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against lost, reordered or altered documents, and against BOS or EOS slipping in."""
    store = tokenize_corpus([corpus], tokenizer, tmp_path / "out", shard_bytes=2000)
    assert verify(store.path).is_whole
    wanted = [(t + " one", "book") for t in texts[:30]] + [(t + " two", "book") for t in texts[:10]]
    wanted += [(text, "web") for text in texts[:20]]
    found = [(tokenizer.decode(store.tokens(n)), store.source(n)) for n in range(len(store))]
    assert found == wanted
    assert store.lengths.key.tolist() == [document_key(source, text.encode()) for text, source in wanted]
    counts = store.manifest.counts
    assert (counts["documents"], counts["broken_records"], counts["empty_documents"]) == (60, 1, 1)
    assert "web.jsonl:21" in counts["examples"][0]
    assert len(list(store.path.glob("shard.*.mds"))) > 3


def test_the_order_of_inputs_does_not_matter(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against the order of arguments deciding the store; that of processes: see test_tokenize_executors."""
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    (corpus / "zzz.jsonl").touch()  # empty: noticed while the documents before it are still being encoded
    files = [corpus / "web.jsonl", corpus / "book/1.jsonl", corpus / "book/2.jsonl", corpus / "zzz.jsonl"]
    one = tokenize_corpus(files, tokenizer, tmp_path / "one")
    two = tokenize_corpus(reversed(files), tokenizer, tmp_path / "two")  # type: ignore[arg-type]
    assert one.fingerprint == two.fingerprint
    assert files_of(one.path) == files_of(two.path)


def test_both_engines_make_the_same_store(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against the engine being part of the data."""
    slow = load_tokenizer(tokenizer.path, backend="hf")
    one = tokenize_corpus([corpus], tokenizer, tmp_path / "one")
    assert files_of(tokenize_corpus([corpus], slow, tmp_path / "two").path) == files_of(one.path)


def test_finished_store_is_reused_and_no_other_replaced(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against hours of work being repeated, or a store of other settings being taken or overwritten."""
    out = tmp_path / "out"
    before = tokenize_corpus([corpus], tokenizer, out).path.stat().st_ino
    with caplog.at_level(logging.INFO):
        tokenize_corpus([corpus], tokenizer, out, num_workers=2)
    assert "is complete and made from the same inputs" in caplog.text and out.stat().st_ino == before
    with pytest.raises(DataError, match="other strict"):
        tokenize_corpus([corpus], tokenizer, out, strict=True)
    with (corpus / "web.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match="other inputs"):
        tokenize_corpus([corpus], tokenizer, out)


def test_same_size_edit_is_noticed(write_jsonl: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against a stale store after an edit that keeps the file's size."""
    path = write_jsonl("a.jsonl", {"text": "x" * 500_000 + "a" + "x" * 500_000})
    tokenize_corpus([path], tokenizer, tmp_path / "out")
    path.write_text(path.read_text().replace("a" + "x" * 9, "b" + "x" * 9, 1))
    with pytest.raises(DataError, match="other inputs"):
        tokenize_corpus([path], tokenizer, tmp_path / "out")


def test_what_stands_at_out(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against a user's folder being replaced, and against an empty one being in the way."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="not a complete token store"):
        tokenize_corpus([corpus], tokenizer, out)
    (out / "thesis.tex").unlink()
    assert len(tokenize_corpus([corpus], tokenizer, out)) == 60


def test_strict_and_missing_field_leave_nothing(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against a stopped run leaving something that looks like a store, with one worker or two."""
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"web\.jsonl:21"):
            tokenize_corpus([corpus], tokenizer, tmp_path / "out", strict=True, num_workers=workers)
    with pytest.raises(DataError, match=r"1\.jsonl:1: no field 'body'"):
        tokenize_corpus([corpus], tokenizer, tmp_path / "out", text_field="body")
    with pytest.raises(ArgumentError, match="num_workers=0"):
        tokenize_corpus([corpus], tokenizer, tmp_path / "out", num_workers=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


DEAD_WORKER = """
import os, sys
from longspan.core.errors import RunError
from longspan.data import load_tokenizer, tokenize_corpus
from longspan.data.tokenize import units

if __name__ == "__main__":
    units.UNIT_BYTES = 1000
    try:
        tokenize_corpus([sys.argv[1]], load_tokenizer(sys.argv[2]), sys.argv[3], num_workers=2)
    except RunError as error:
        print(error)
else:
    os._exit(9)  # a spawned worker imports this file, and dies
"""


def test_dead_worker_is_a_run_error(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against waiting for ever for a worker that the system killed."""
    script = tmp_path / "dead.py"
    script.write_text(DEAD_WORKER)
    arguments = [str(corpus), str(tokenizer.path), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert "a worker process died" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "dead.py"]


KILLED = """
import os, signal, sys
from longspan.data import load_tokenizer, tokenize_corpus
from longspan.data.store import directory
from longspan.data.tokenize import units

flush = directory.MDSWriter._flush
flushed = []

def flush_and_die(self):
    flush(self)
    flushed.append(self.path)
    if len(flushed) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

directory.MDSWriter._flush = flush_and_die
units.UNIT_BYTES = 2000
tokenize_corpus([sys.argv[1]], load_tokenizer(sys.argv[2]), sys.argv[3])
"""


def test_killed_run_goes_on(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against kill -9 half-way leaving a store that opens, finished pieces being made again, and
    another store than that of an undisturbed run."""
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    undisturbed = tokenize_corpus([corpus], tokenizer, tmp_path / "whole")
    arguments = [str(corpus), str(tokenizer.path), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.pieces", "corpus", "whole"]
    pieces = {path: path.stat().st_ino for path in (tmp_path / ".out.pieces").glob("[0-9]*")}
    assert len(pieces) == 4 and list((tmp_path / ".out.pieces").glob(".000004.*.tmp"))

    made: list[int] = []
    make = corpus_module.make_piece
    monkeypatch.setattr(
        corpus_module, "make_piece", lambda job, unit: made.append(unit.number) or make(job, unit)
    )
    with pytest.raises(DataError, match="other strict"):
        tokenize_corpus([corpus], tokenizer, tmp_path / "out", strict=True)
    assert {path: path.stat().st_ino for path in pieces} == pieces, "the refused run has touched nothing"
    store = tokenize_corpus([corpus], tokenizer, tmp_path / "out")
    assert made == [4, 5]
    assert files_of(store.path) == files_of(undisturbed.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out", "whole"]


def test_changed_input_does_not_go_on(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a store made half of a file before and half of it after an edit of the same size."""
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    job = CorpusJob([corpus], tokenizer, tmp_path / "out")
    assert job.run_share(LocalExecutor(), ArrayJob(0, 2)) is None
    path = corpus / "book" / "1.jsonl"
    path.write_text(path.read_text().replace("river", "RIVER"))
    with pytest.raises(DataError, match="made of other inputs"):
        CorpusJob([corpus], tokenizer, tmp_path / "out").run_share(LocalExecutor(), ArrayJob(0, 2))


HOLDER = """
import sys, time
from longspan.data.jobs.job_lock import JobLock
from pathlib import Path

with JobLock(Path(sys.argv[1]), what="out"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_job_stops(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against two jobs writing one store; a killed job leaves no lock behind."""
    lock = tmp_path / ".out.pieces" / "job-0-of-1.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=rf"another job is at work on(.|\n)*process {holder.pid} on"):
            tokenize_corpus([corpus], tokenizer, tmp_path / "out")
        with pytest.raises(RunError, match=r"job-0-of-1\.lock is held"):
            CorpusJob([corpus], tokenizer, tmp_path / "out").run_share(LocalExecutor(), ArrayJob(1, 3))
        assert lock.exists()
        holder.kill()
    assert len(tokenize_corpus([corpus], tokenizer, tmp_path / "out")) == 60


def test_lock_of_another_machine(tmp_path: Path) -> None:
    """Guards against a job on another machine being overlooked where flock does not reach, and against its
    crash closing a folder for ever."""
    path = tmp_path / "lock"
    path.write_text('{"pid": 7, "host": "elsewhere", "since": "today"}')
    with pytest.raises(RunError, match="process 7 on elsewhere since today"), JobLock(path, what="x"):
        pass
    os.utime(path, (1e9, 1e9))
    with JobLock(path, what="x"):
        assert "elsewhere" not in path.read_text()
    assert path.read_text() == "" and [each.name for each in tmp_path.iterdir()] == ["lock"]


def test_one_large_file_is_shared(
    texts: list[str],
    write_jsonl: Write,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against lines lost or doubled where a file is cut, and against masks in some pieces only."""
    weighted = {"text": texts[7], "loss_weights": [[0, 5, 3]]}
    records = [
        weighted if number == 70 else {"text": f"{number} {text}"} for number, text in enumerate(texts * 2)
    ]
    path = write_jsonl("large.jsonl", *records)
    whole = tokenize_corpus([path], tokenizer, tmp_path / "whole")
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    assert CorpusJob([path], tokenizer, tmp_path / "cut").num_units > 5
    cut = tokenize_corpus([path], tokenizer, tmp_path / "cut")
    assert verify(cut.path).is_whole
    assert cut.fingerprint == whole.fingerprint and len(cut) == 100
    mask = cut.mask(70)
    assert mask is not None and int(mask.max()) == 3
    plain = cut.mask(3)
    assert plain is not None and set(plain.tolist()) == {1}


def test_long_document(
    texts: list[str],
    write_jsonl: Write,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards against a long document being encoded otherwise, or weighed otherwise, than a short one."""
    text = " ".join(texts)
    spans = [[len(text) - 9, len(text), 5], [0, 3, 0]]
    path = write_jsonl("long.jsonl", {"text": text}, {"text": text, "loss_weights": spans})
    whole = tokenize_corpus([path], tokenizer, tmp_path / "whole")
    monkeypatch.setattr(engine, "PIECE_CHARACTERS", {"gigatoken": 100, "hf": 64})
    monkeypatch.setattr(encode, "LONG_CHARACTERS", 77)
    assert files_of(tokenize_corpus([path], tokenizer, tmp_path / "cut").path) == files_of(whole.path)


def test_loss_weights_reach_their_tokens(write_jsonl: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against weights that are shifted by an accent, a leading space or a special token."""
    text = "the caf\u00e9 reads a long book , then 42 lines"
    start, end = text.index("book"), text.index("book") + 4
    digits = text.index("42")
    spans = [[0, 3, 0], [start, end, 9], [digits, digits + 1, 255]]
    path = write_jsonl("a.jsonl", {"text": text, "loss_weights": spans}, {"text": "a river"})
    store = tokenize_corpus([path], tokenizer, tmp_path / "out")
    ids, mask = store.tokens(0), store.mask(0)
    assert mask is not None and ids.tolist() == tokenizer.encode(text).tolist()
    found = {weight: tokenizer.decode(ids[mask == weight]) for weight in (0, 9, 255)}
    assert found == {0: "the", 9: " book", 255: "4"}
    assert tokenizer.decode(ids[mask == 1]) == " caf\u00e9 reads a long , then 2 lines"
    plain = store.mask(1)
    assert plain is not None and set(plain.tolist()) == {1}


SPANS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 255)), max_size=4)


@settings(max_examples=100, deadline=None)
@given(spans=SPANS, cuts=st.lists(st.integers(0, 8), max_size=6))
def test_token_weights_against_a_plain_loop(spans: list[tuple[int, int, int]], cuts: list[int]) -> None:
    """Guards against the search for the first weighted character being off by one."""
    spans = [(min(a, b), max(a, b), weight) for a, b, weight in spans]
    edges = sorted({0, 8, *cuts})
    starts, ends = np.array(edges[:-1]), np.array(edges[1:])
    expected = []
    for start, end in zip(starts, ends):
        held = [[w for a, b, w in spans if a <= character < b] for character in range(start, end)]
        expected.append(next((weights[-1] for weights in held if weights), 1))
    assert token_weights(spans, starts, ends, num_characters=8).tolist() == expected


def test_conversations(
    write_jsonl: Write, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against user turns being trained, and against one bad conversation ending a run."""
    template = (
        "{% for m in messages %}{{ bos_token if m.role == 'user' else '' }}"
        "{{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
    )
    chat = ChatFormat(tokenizer, template)
    turns = [
        {"role": "user", "content": "a long book"},
        {"role": "assistant", "content": "the river <|eos|>"},
    ]
    bad = [{"role": "nobody", "content": "x"}]
    path = write_jsonl(
        "chat.jsonl", {"messages": turns}, {"messages": bad}, *({"messages": turns + turns},) * 9
    )
    store = tokenize_corpus([path], tokenizer, tmp_path / "out", chat=chat)
    wanted = chat.encode(turns)
    mask = store.mask(0)
    assert mask is not None and mask.tolist() == wanted.mask.tolist()
    assert store.tokens(0).tolist() == wanted.ids.tolist()
    assert tokenizer.decode(store.tokens(0)[mask == 1]) == " the river <|eos|><|eos|>"
    assert (len(store), store.manifest.counts["broken_records"]) == (10, 1)
    monkeypatch.setattr(units, "UNIT_BYTES", 300)
    two = tokenize_corpus([path], tokenizer, tmp_path / "two", chat=chat, num_workers=2)
    assert two.fingerprint == store.fingerprint
    with pytest.raises(DataError, match="nobody"):
        tokenize_corpus([path], tokenizer, tmp_path / "strict", chat=chat, strict=True)
    with pytest.raises(DataError, match="other chat"):
        tokenize_corpus([path], tokenizer, tmp_path / "out", chat=ChatFormat(tokenizer, "{# #}" + template))
    with pytest.raises(DataError, match="template"):
        tokenize_corpus([path], tokenizer, tmp_path / "none", messages_field="messages")


def test_groups(texts: list[str], write_jsonl: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against files of one repository staying apart, and against their order depending on files."""
    rows = [{"text": texts[number], "repo": f"r{number % 3}", "at": -number} for number in range(12)]
    write_jsonl("code/a.jsonl", *rows[:7])
    folder = write_jsonl("code/b.jsonl", *rows[7:]).parent
    store = tokenize_corpus([folder], tokenizer, tmp_path / "out", group_by="repo", order_by="at")
    found = {tokenizer.decode(store.tokens(number)) for number in range(len(store))}
    assert found == {"\n\n".join(texts[number] for number in (9 + r, 6 + r, 3 + r, r)) for r in range(3)}
    with pytest.raises(DataError, match="other group_by"):
        tokenize_corpus([folder], tokenizer, tmp_path / "out")
    with pytest.raises(ConfigError, match="give group_by"):
        tokenize_corpus([folder], tokenizer, tmp_path / "out", order_by="at")
    with pytest.raises(ConfigError, match="did you mean 'order_by'"):
        tokenize_corpus([folder], tokenizer, tmp_path / "out", orderby="at")
    config = TokenizeConfig(group_by="repo", order_by="at")
    assert CorpusJob([folder], tokenizer, tmp_path / "out", config).finished() is not None


def test_documents_without_tokens_are_counted(
    write_jsonl: Write, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against empty arrays, which MDS has no form for, ending a run."""
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **_: encode("" if text == "drop" else text))
    path = write_jsonl("a.jsonl", {"text": "drop"}, {"text": "keep"})
    store = tokenize_corpus([path], tokenizer, tmp_path / "out")
    assert (len(store), store.manifest.counts["documents"], store.manifest.counts["empty_documents"]) == (
        1,
        1,
        1,
    )


def test_keys_tell_sources_apart() -> None:
    """Guards against ("ab", "c") and ("a", "bc") being one document."""
    keys = {document_key("ab", b"c"), document_key("a", b"bc"), document_key("ab", b"d")}
    assert len(keys) == 3
    # One zero byte, in the tests of the reference implementation of XXH3.
    assert document_key("", b"") == 0xC44BDFF4074EECDB
