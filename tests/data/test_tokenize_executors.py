"""The same store whoever makes it: 1, 2 or 4 workers, files in any order, jobs of an array, Ray; plain, grouped
and sampled corpora. And whole after kill -9 while groups are dealt or encoded."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longspan.core.errors import ArgumentError, DataError, RunError
from longspan.data.jobs import ArrayJob, LocalExecutor, array_job
from longspan.data.jobs.job_lock import JobLock
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.readers import ReadReport, grouping, list_inputs, read_documents
from longspan.data.tokenize import CorpusJob, TokenizeConfig, groups, sampling, tokenize_corpus, units
from longspan.data.tokenize import corpus as corpus_module
from longspan.data.tokenizer import Tokenizer
from tests.data.test_tokenize import files_of
from tests.patience import PATIENCE_SECONDS

Write = Callable[..., Path]
UNIT_BYTES = 3000
GROUPS: dict[str, Any] = {"group_by": "repo", "order_by": "n"}
MIX: dict[str, Any] = {"mix": MixtureConfig(mode="per_source", tokens=700, keep_short=0.5, threshold=60)}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": GROUPS,
    "sampled": MIX,
    "grouped and sampled": {**GROUPS, **MIX},
}


@pytest.fixture
def corpus(texts: list[str], write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Four files of 2 sources, cut into a dozen units; each of the 25 groups is spread over all files."""
    monkeypatch.setattr(units, "UNIT_BYTES", UNIT_BYTES)
    monkeypatch.setattr(sampling, "FIRST_WAVE", 2)
    monkeypatch.setattr(grouping, "RUN_BYTES", 1000)
    rows = [{"text": f"{n} {texts[n % 50]}", "repo": f"r{n % 25}", "n": -n} for n in range(120)]
    return [
        write_jsonl(
            f"corpus/{'ab'[k % 2]}/{k}.jsonl", *rows[k::4], b"{broken", {"text": "", "repo": "x", "n": 0}
        )
        for k in range(4)
    ]


@pytest.fixture(scope="module")
def pools() -> Iterator[list[LocalExecutor]]:
    """Processes that all tests of this file share."""
    with LocalExecutor(1) as one, LocalExecutor(3) as three:
        yield [one, three]


@pytest.mark.parametrize("kind", list(KINDS))
def test_workers_and_input_order_do_not_matter(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path, pools: list[LocalExecutor], kind: str
) -> None:
    """Guards against the number of processes, their timing, or the order of arguments being part of the data."""
    found = []
    for pool in pools:
        files = random.Random(pool.num_workers).sample(corpus, len(corpus))
        job = CorpusJob(files, tokenizer, tmp_path / f"out{pool.num_workers}", TokenizeConfig(**KINDS[kind]))
        assert job.num_units > 4
        store = job.run(pool)
        assert store is not None
        found.append(files_of(store.path))
    assert found[0] == found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out1", "out3"]


@pytest.mark.parametrize("kind", ["plain", "grouped"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_jobs_of_an_array_make_the_same_store(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path, kind: str, order: tuple[int, ...]
) -> None:
    """Guards against the number of jobs, or which of them is last, being part of the data."""
    one = tokenize_corpus(corpus, tokenizer, tmp_path / "one", **KINDS[kind])
    for place, index in enumerate(order):
        variables = {"SLURM_ARRAY_TASK_ID": str(index + 4), "SLURM_ARRAY_TASK_COUNT": "3"}
        share = array_job({**variables, "SLURM_ARRAY_TASK_MIN": "4"})
        job = CorpusJob(corpus, tokenizer, tmp_path / "out", TokenizeConfig(**KINDS[kind]))
        if place == 2:
            with pytest.raises(DataError, match="pieces are missing"):
                job.merge_only()
        store = job.run_share(LocalExecutor(), share)
        assert (store is None) == (place < 2)
    assert store is not None and files_of(store.path) == files_of(one.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "one", "out"]
    again = CorpusJob(corpus, tokenizer, tmp_path / "out", TokenizeConfig(**KINDS[kind]))
    found = again.run_share(LocalExecutor(), ArrayJob(1, 3))
    assert found is not None and found.fingerprint == store.fingerprint


def test_jobs_wait_for_those_that_deal(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a job encoding half a group because another one has not dealt yet, against one that waits
    for a job that is gone, and against pieces that are made twice."""
    one = tokenize_corpus(corpus, tokenizer, tmp_path / "one", **GROUPS)
    monkeypatch.setattr(corpus_module, "POLL_SECONDS", 0.01)
    begun, may_end = threading.Barrier(3), threading.Event()
    deal_unit, make_piece, made = corpus_module.deal_unit, corpus_module.make_piece, []

    def deal(job: Any, unit: Any) -> Any:
        if unit.number < 3:
            begun.wait(PATIENCE_SECONDS)
        if unit.number == 2:
            may_end.wait(PATIENCE_SECONDS)
        return deal_unit(job, unit)

    def make(job: Any, unit: Any) -> Any:
        assert may_end.is_set()
        made.append(unit.number)
        return make_piece(job, unit)

    monkeypatch.setattr(corpus_module, "deal_unit", deal)
    monkeypatch.setattr(corpus_module, "make_piece", make)
    jobs = [CorpusJob(corpus, tokenizer, tmp_path / "out", TokenizeConfig(**GROUPS)) for _ in range(3)]
    threads = [
        threading.Thread(target=job.run_share, args=(LocalExecutor(), ArrayJob(index, 3)))
        for index, job in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    inputs = len(units.cut_units(list_inputs(corpus, report=ReadReport()), UNIT_BYTES))
    others = [number for number in range(inputs) if number % 3 != 2]
    while len(list((tmp_path / ".out.pieces/dealt").glob("[0-9]*/"))) < len(others):
        assert all(thread.is_alive() for thread in threads)
    may_end.set()
    for thread in threads:
        thread.join(60)
    assert sorted(made) == list(range(jobs[0].num_units))
    assert files_of(tmp_path / "out") == files_of(one.path)


def test_groups_of_a_store_are_those_of_the_reader(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Guards against groups torn where input is cut, lost or doubled records, and counts of records as
    documents."""
    store = tokenize_corpus(corpus, tokenizer, tmp_path / "out", **GROUPS)
    wanted = [(each.text, each.source) for each in read_documents(corpus, **GROUPS)]
    assert [(tokenizer.decode(store.tokens(n)), store.source(n)) for n in range(len(store))] == wanted
    assert len(wanted) == 25
    counts = store.manifest.counts
    names = ("files", "documents", "broken_records", "empty_documents")
    assert [counts[name] for name in names] == [4, 25, 4, 4]


KILLED = """
import os, signal, sys
from longspan.data import load_tokenizer, tokenize_corpus
from longspan.data.readers import grouping
from longspan.data.tokenize import encode, groups, units

calls = []

def dies(function):
    def call(*args, **kwargs):
        calls.append(args)
        result = function(*args, **kwargs)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if sys.argv[1] == "deal":
    groups.deal = dies(groups.deal)
else:
    encode.save_rows = dies(encode.save_rows)
units.UNIT_BYTES, grouping.RUN_BYTES = 3000, 1000
tokenize_corpus([sys.argv[2]], load_tokenizer(sys.argv[3]), sys.argv[4], group_by="repo", order_by="n")
"""


@pytest.mark.parametrize("phase", ["deal", "encode"])
def test_killed_run_goes_on(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Guards against kill -9 while groups are dealt or encoded leaving a store that opens, finished work being
    done again, and another store than that of an undisturbed run."""
    folder = tmp_path / "corpus"
    undisturbed = tokenize_corpus([folder], tokenizer, tmp_path / "whole", **GROUPS)
    arguments = [phase, str(folder), str(tokenizer.path), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()

    worked: dict[str, list[int]] = {"deal": [], "encode": []}
    deal_unit, make_piece = groups.deal_unit, corpus_module.make_piece
    monkeypatch.setattr(
        corpus_module,
        "deal_unit",
        lambda job, unit: worked["deal"].append(unit.number) or deal_unit(job, unit),
    )
    monkeypatch.setattr(
        corpus_module,
        "make_piece",
        lambda job, unit: worked["encode"].append(unit.number) or make_piece(job, unit),
    )
    with pytest.raises(DataError, match="other order_by"):
        tokenize_corpus([folder], tokenizer, tmp_path / "out", group_by="repo")
    job = CorpusJob([folder], tokenizer, tmp_path / "out", TokenizeConfig(**GROUPS))
    store = job.run(LocalExecutor())
    first = 3  # of the fourth, killed as it ended, nothing counts
    inputs = len(units.cut_units(list_inputs([folder], report=ReadReport()), UNIT_BYTES))
    assert worked["deal"] == (list(range(first, inputs)) if phase == "deal" else [])
    assert worked["encode"] == list(range(0 if phase == "deal" else first, job.num_units))
    assert store is not None and files_of(store.path) == files_of(undisturbed.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out", "whole"]


def test_what_groups_leave_behind(corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against a failed run leaving texts on the disk, an edited input going unnoticed between dealing
    and encoding, and against a sample that jobs of an array cannot share."""
    with pytest.raises(DataError, match="no field 'folder'"):
        tokenize_corpus(corpus, tokenizer, tmp_path / "out", group_by="folder")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    with pytest.raises(ArgumentError, match="jobs of an array cannot sample"):
        CorpusJob(corpus, tokenizer, tmp_path / "out", TokenizeConfig(**GROUPS, **MIX)).run(
            LocalExecutor(), ArrayJob(0, 2)
        )
    CorpusJob(corpus, tokenizer, tmp_path / "out", TokenizeConfig(**GROUPS)).run(
        LocalExecutor(), ArrayJob(0, 2)
    )
    path = corpus[0]
    path.write_text(path.read_text().replace("river", "RIVER"))
    with pytest.raises(DataError, match="made of other inputs"):
        CorpusJob(corpus, tokenizer, tmp_path / "out", TokenizeConfig(**GROUPS)).run(
            LocalExecutor(), ArrayJob(0, 2)
        )


def test_looking_at_a_lock_takes_nothing(tmp_path: Path) -> None:
    """Guards against a waiting job being in the way of the one it waits for."""
    lock = JobLock(tmp_path / "lock", what="x")
    assert not lock.is_held() and not (tmp_path / "lock").exists()
    with lock:
        assert JobLock(lock.path, what="x").is_held()
        with pytest.raises(RunError), JobLock(lock.path, what="x"):
            pass
    assert not lock.is_held()
    lock.path.write_text('{"pid": 7, "host": "elsewhere", "since": "today"}')
    assert JobLock(lock.path, what="x").is_held()
    os.utime(lock.path, (1e9, 1e9))
    assert not JobLock(lock.path, what="x").is_held()


RAY = """
import sys
from longspan.data import load_tokenizer
from longspan.data.jobs import RayExecutor
from longspan.data.readers import grouping
from longspan.data.tokenize import CorpusJob, TokenizeConfig, sampling, units
from tests.data.test_tokenize_executors import KINDS

units.UNIT_BYTES, sampling.FIRST_WAVE, grouping.RUN_BYTES = 3000, 2, 1000
with RayExecutor(num_workers=2) as executor:
    for kind, settings in KINDS.items():
        config = TokenizeConfig(**settings)
        CorpusJob([sys.argv[1]], load_tokenizer(sys.argv[2]), f"{sys.argv[3]}/ray {kind}", config).run(executor)
"""


@pytest.mark.slow
def test_ray_makes_the_same_store(corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against the cluster being part of the data. Starting Ray takes some 10 s."""
    pytest.importorskip("ray", reason="the ray package is not installed")
    root = Path(__file__).parents[2]
    arguments = [str(tmp_path / "corpus"), str(tokenizer.path), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run(
        [sys.executable, "-c", RAY, *arguments],
        check=True,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        env=environment,
    )
    for kind, settings in KINDS.items():
        one = tokenize_corpus([tmp_path / "corpus"], tokenizer, tmp_path / kind, **settings)
        assert files_of(tmp_path / f"ray {kind}") == files_of(one.path), kind


RAY_GPUS = """
import json, os
import ray
from longspan.data.jobs import RayExecutor

def visible(unit):
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")

ray.init(num_cpus=2, num_gpus=2, log_to_driver=False, include_dashboard=False)
found = {}
for use_gpus in (True, False):
    with RayExecutor(use_gpus=use_gpus) as executor:
        found[use_gpus] = [executor.num_workers, *executor.run(visible, range(3))]
print(json.dumps([found[True], found[False]]))
"""


@pytest.mark.slow
def test_ray_gives_a_gpu_to_who_asks_for_one() -> None:
    """Ray hides all GPUs from tasks that ask for none: teachers ran on CPUs beside idle GPUs."""
    pytest.importorskip("ray", reason="the ray package is not installed")
    command = [sys.executable, "-c", RAY_GPUS]
    said = subprocess.run(
        command, check=True, capture_output=True, timeout=PATIENCE_SECONDS, text=True
    ).stdout
    with_gpus, without = json.loads(said.splitlines()[-1])
    assert with_gpus[0] == 2 and set(with_gpus[1:]) <= {"0", "1"}
    assert without[1:] == ["", "", ""]
