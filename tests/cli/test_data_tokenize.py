"""`longspan data tokenize`: jobs, sampling and the file for Slurm."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

RUN = "data tokenize texts --tokenizer tokenizer"


def test_jobs_share_the_work(longspan, store, tmp_path, monkeypatch):
    """The last of the jobs makes the store, and it is the one that a single job makes."""
    from longspan.data.store import TokenStore
    from longspan.data.tokenize import units

    monkeypatch.setattr(units, "UNIT_BYTES", 50_000)
    single = longspan(f"{RUN} --out single --json")
    first = longspan(f"{RUN} --out shared --num-jobs 2 --job-id 1")
    assert first.code == 0 and "pieces are still missing" in first.out
    early = longspan(f"{RUN} --out shared --merge-only")
    assert early.code == 2 and "pieces are missing" in early.err
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    last = longspan(f"{RUN} --out shared --executor slurm --json")
    assert last.code == 0, last.err
    assert json.loads(last.out)["sources"] == json.loads(single.out)["sources"]
    assert (
        TokenStore("shared").fingerprint == TokenStore("single").fingerprint == TokenStore(store).fingerprint
    )


def test_sbatch_file(longspan, store):
    """The printed file runs this very command, as a job of an array."""
    outcome = longspan(f"{RUN} --out 'a b' --num-jobs 8 --workers 4 --print-sbatch")
    assert outcome.code == 0 and "#SBATCH --array=0-7" in outcome.out
    command = shlex.split(outcome.out.splitlines()[-1])
    assert command == [
        "srun",
        "longspan",
        *shlex.split(RUN),
        "--out",
        "a b",
        "--workers",
        "4",
        "--executor",
        "slurm",
    ]
    assert longspan(f"{RUN} --out x --print-sbatch").code == 2


def test_sample_and_exact_mixture(longspan, store):
    """The command line that a sample prints makes the mixture that was asked for."""
    spec = "mode=per_source,keep_short=0.5,threshold=2k"
    outcome = longspan(f"{RUN} --out sample --mix {spec} --tokens 20k --seed 3")
    assert outcome.code == 0, outcome.err
    line = next(line for line in outcome.out.splitlines() if "data mix" in line)
    mixed = longspan(line[line.index("data mix") :] + " --json")
    assert mixed.code == 0, mixed.err
    assert json.loads(mixed.out)["tokens"] >= 20_000


@pytest.mark.parametrize(
    "options,words",
    [
        ("--num-jobs 3", "--job-id"),
        ("--executor slurm", "not a job of a Slurm array"),
        ("--num-jobs 3 --job-id 3", "no such job"),
        ("--tokens 5B", "only with --mix"),
        ("--mix mode=per_source", "number of tokens"),
        ("--mix mode=nothing --tokens 5", "mode"),
        ("--mix mode=repeat,weights.texts=2 --tokens 5", "--mix"),
        ("--order-by at", "give group_by"),
        ("--tokenizer tokenizer/none.model", "none.model"),
    ],
)
def test_options_that_do_not_fit(longspan, store, options, words):
    """A setting without an effect, or one that cannot be, is one message."""
    outcome = longspan(f"{RUN} --out other {options}")
    assert outcome.code == 2 and words in outcome.err, outcome.err


def test_a_store_says_how_it_was_made(longspan, store):
    """The settings stand in the store, without the number of workers: its bytes do not tell who did the work."""
    made = longspan(f"{RUN} --out first --mix mode=per_source,tokens=20k --seed 3 --workers 2")
    assert made.code == 0, made.err
    again = longspan("data tokenize --settings first --out again")
    assert again.code == 0, again.err
    for file in Path("first").rglob("*"):
        if file.is_file():
            assert Path("again", file.relative_to("first")).read_bytes() == file.read_bytes(), file
    assert longspan("data verify first").code == 0


@pytest.mark.parametrize("share", ["", "--num-jobs 2 --job-id 0"])
def test_what_is_not_there_is_refused_before_a_cluster_starts(longspan, store, monkeypatch, share):
    """Ray was started, or a cluster joined, to say that a tokenizer or an input is not there."""
    from longspan.cli import jobs_config
    from longspan.data.jobs import LocalExecutor

    entered = []

    class Watched(LocalExecutor):
        def __enter__(self):
            entered.append(self)
            return super().__enter__()

    monkeypatch.setattr(jobs_config, "LocalExecutor", Watched)
    for wrong in (f"{RUN}/none.model", "data tokenize nowhere --tokenizer tokenizer"):
        assert longspan(f"{wrong} --out x {share}").code == 2 and not entered
    assert longspan(f"{RUN} --out x {share}").code == 0 and len(entered) == 1
