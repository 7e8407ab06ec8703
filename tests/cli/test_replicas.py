"""`--replicas`: the records of one process, whoever answered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longspan.eval.records import read_records
from tests.cli.conftest import Command
from tests.patience import PATIENCE_SECONDS

NEEDLE = (
    "eval needle --model model --lengths 96,160 --depths 0,1 --samples 2 --data texts --mode generate "
    "--max-new-tokens 4 --key amber --key copper"
)
PPL = "eval ppl --model model --data texts --num-documents 3 --lengths 64,128"


def recorded(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the fingerprint of a finished records file, and its samples by their ids without the times."""
    found = read_records(path)
    assert found.complete and len({sample["id"] for sample in found.samples}) == len(found.samples)
    samples = {sample["id"]: {**sample, "seconds": None} for sample in found.samples}
    return found.header["fingerprint"], samples


def test_replicas_go_on_with_what_one_process_recorded(
    longspan: Command, model: Path, tmp_path: Path
) -> None:
    """Records that depend on the number of replicas could not be gone on with, or would be asked for again."""
    assert longspan(f"{NEEDLE} --out alone").code == 0
    alone = tmp_path / "alone/records/needle-model.jsonl"
    shared = tmp_path / "shared/records/needle-model.jsonl"
    shared.parent.mkdir(parents=True)
    begun = alone.read_bytes().splitlines(keepends=True)[:4]
    shared.write_bytes(b"".join(begun))
    outcome = longspan(f"{NEEDLE} --out shared --replicas 2")
    assert outcome.code == 0, outcome.err
    assert shared.read_bytes().startswith(b"".join(begun))
    assert recorded(shared) == recorded(alone)
    assert [path.name for path in shared.parent.iterdir()] == [shared.name]
    assert longspan(f"{NEEDLE} --out shared --replicas 2 --tp 2").err.count("(tp 2, replicas 2)") == 1


@pytest.mark.slow
def test_the_processes_of_torchrun_are_replicas(longspan: Command, model: Path, tmp_path: Path) -> None:
    """Without a word each process would evaluate all, and write the same file."""
    assert longspan(f"{PPL} --out alone").code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*torchrun, "-m", "longspan", *PPL.split(), "--out", "shared"],
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("perplexity, model") == 1
    (fingerprint, found), (expected_fingerprint, expected) = (
        recorded(tmp_path / name / "records/ppl-model.jsonl") for name in ("shared", "alone")
    )
    assert fingerprint == expected_fingerprint and found.keys() == expected.keys()
    for name, sample in found.items():
        sums = [bucket["nll"] for bucket in sample["buckets"]]
        assert sums == pytest.approx([bucket["nll"] for bucket in expected[name]["buckets"]], rel=1e-5)
