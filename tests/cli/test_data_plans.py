"""Mixing, packing and looking from the command line, as a user types it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from longspan.data.packed.packed_rows import PackedRows
from longspan.data.plans.packing import PackPlan
from longspan.data.store import TokenStore


def test_stores_are_mixed_as_prolong_writes_it(longspan, store: Path) -> None:
    """STORE@SHARE and STORE#USES; a store may be named twice."""
    tokens = TokenStore(store).num_tokens
    found = json.loads(longspan("data mix store#2 --out twice --json").out)
    assert found["tokens"] == 2 * tokens
    found = json.loads(longspan("data mix store@0.25 store@0.75 --tokens 4000 --out mixed --json").out)
    assert found["sources"]["1"]["requested"] == 3000
    assert set(found["lengths"]) == {"before", "after"}
    outcome = longspan("data mix store@0.25 store --out mixed")
    assert outcome.code == 2 and "every stream has a share" in outcome.err
    outcome = longspan("data mix store@1 --mode global --out mixed")
    assert outcome.code == 2 and "--mode" in outcome.err


def test_a_preset_names_what_the_data_lacks(longspan, store: Path) -> None:
    """The shares of ten sources mean nothing for a corpus of one."""
    outcome = longspan("data mix store --preset prolong-64k --out mixed")
    assert outcome.code == 2 and "no code-repo" in outcome.err
    outcome = longspan("data mix store --preset prolong --out mixed")
    assert outcome.code == 2 and "prolong-64k" in outcome.err


def test_before_and_after_are_shown_and_drawn(longspan, store: Path) -> None:
    """What mixing did to the lengths is the point of mixing."""
    outcome = longspan("data mix store --mode global --keep-short 0.2 --threshold 2k --out m --plot mix.png")
    assert outcome.code == 0, outcome.err
    assert "lengths in tokens: before" in outcome.out and "lengths in tokens: after mixing" in outcome.out
    assert Path("mix.png").read_bytes().startswith(b"\x89PNG")
    assert longspan("data lengths store --plot lengths.png").code == 0
    assert Path("lengths.png").read_bytes().startswith(b"\x89PNG")


def test_packing_says_where_every_token_went(longspan, store: Path) -> None:
    """In = packed + dropped + left over, in one line that can be checked by eye."""
    outcome = longspan("data pack store --length 4k --min-length 3k --min-tail 400 --out rows")
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("tokens: ")]
    total, parts = line.removeprefix("tokens: ").split(" in = ")
    counts = [int(part.split()[0].replace(",", "")) for part in parts.split(" + ")]
    assert int(total.replace(",", "")) == sum(counts) == TokenStore(store).num_tokens
    assert "short" in line and "tail" in line and "left over" in line


def test_documents_longer_than_a_row_are_cut_headed_or_left_out(longspan, store: Path) -> None:
    """What is left out of a document is counted, whatever becomes of it."""
    counts = {}
    for overflow in ("split", "drop_tail", "drop"):
        outcome = longspan(f"data pack store --length 4k --overflow {overflow} --out {overflow} --json")
        assert outcome.code == 0, outcome.err
        counts[overflow] = json.loads(outcome.out)
        assert ("documents longer than a row" in outcome.err) == (overflow == "drop")
    split, heads, whole = counts.values()
    assert split["documents_in"] == heads["documents_in"] > whole["documents_in"] > 0
    assert heads["dropped"]["overflow"] > 0 and "overflow" not in split["dropped"]
    lengths = TokenStore(store).lengths.tokens.astype(int)
    assert heads["dropped"]["overflow"] == sum(max(0, tokens - 4096) for tokens in lengths)
    assert longspan("data pack store --length 4k --overflow cut --out no").code == 2


def test_splitting_into_lengths_makes_a_plan_each(longspan, store: Path) -> None:
    """Plans and rows of each length stand under its name."""
    command = (
        "data pack store --length 1024 --strategy split --split-lengths 1k,256 --out p --materialize r --json"
    )
    outcome = longspan(command)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert [Path(each["plan"]).name for each in found] == ["1024-1024", "256-1024"]
    packed = sum(each["tokens_packed"] + each["dropped"]["remainder"] for each in found)
    assert packed + found[0]["dropped"]["tail"] == TokenStore(store).num_tokens
    assert PackedRows("r/256-1024").num_rows == found[1]["rows"]


def test_rows_are_written_and_looked_at(longspan, store: Path) -> None:
    """A plan, its rows for other tools, and a row with the borders of its documents."""
    options = "--length 512 --specials both --overlap 16 --mos bos --remainder pad"
    outcome = longspan(
        f"data pack store {options} --out rows --materialize chunks --format jsonl --workers 1"
    )
    assert outcome.code == 0, outcome.err
    for place in ("rows", "chunks"):
        outcome = longspan(f"data peek {place} --index 3 --tokenizer tokenizer")
        assert outcome.code == 0, outcome.err
        assert "--- 0.." in outcome.out or " 0.." in outcome.out
        assert "document" in outcome.out
    shown = json.loads(longspan("data peek rows --index 3 --tokenizer tokenizer --json").out)
    assert sum(span["tokens"] for span in shown["spans"]) == 512
    outcome = longspan("data pack store --length 512 --mos sep --out other")
    assert outcome.code == 2 and "mos is not a token" in outcome.err


def test_jobs_share_the_writing_of_rows(longspan, store: Path, monkeypatch) -> None:
    """The last job of an array makes the rows, the same as one job; another plan there is not written over."""
    from longspan.data.packed import materialize

    monkeypatch.setattr(materialize, "rows_folder", partial(materialize.rows_folder, piece_bytes=4096))
    pack = "data pack store --length 2048 --strategy split --split-lengths 2048,1024"
    assert longspan(f"{pack} --out one --materialize one-rows --workers 1").code == 0
    first = longspan(f"{pack} --out p --materialize r --num-jobs 2 --job-id 1 --json")
    assert first.code == 0, first.err
    assert [each["missing"] > 0 for each in json.loads(first.out)] == [True, True]
    assert not Path("r").exists() or not [path for path in Path("r").iterdir() if path.name[0] != "."]
    wrong = longspan(f"{pack} --seed 1 --out p --materialize r --num-jobs 2 --job-id 0")
    assert wrong.code == 2 and "something else than this plan" in wrong.err
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    last = longspan(f"{pack} --out p --materialize r --executor slurm")
    assert last.code == 0 and "missing" not in last.out, last.err
    for name in ("2048-2048", "1024-2048"):
        files = {path.name: path.read_bytes() for path in Path("one-rows", name).iterdir()}
        assert {path.name: path.read_bytes() for path in Path("r", name).iterdir()} == files and len(
            files
        ) > 3


def test_a_plan_alone_is_not_shared(longspan, store: Path) -> None:
    """Jobs without rows to write would all do the same."""
    outcome = longspan("data pack store --length 512 --out p --num-jobs 2 --job-id 0")
    assert outcome.code == 2 and "--materialize" in outcome.err
    script = longspan("data pack store --length 512 --out p --materialize r --num-jobs 4 --print-sbatch").out
    assert "--array=0-3" in script and script.endswith("--materialize r --executor slurm\n")
    assert not Path("p").exists()


def test_a_form_of_rows_that_nobody_writes_is_refused(longspan, store: Path) -> None:
    """--labels without --materialize was taken and did nothing; a wrong one was found when the plan was written."""
    for form, part in (("--labels next", "--materialize"), ("--labels all --materialize rows", "--labels"),
                       ("--format npz --materialize rows", "--format")):  # fmt: skip
        outcome = longspan(f"data pack store --length 64 --out plan {form}")
        assert outcome.code == 2 and part in outcome.err
    assert not Path("plan").exists()


def test_damage_is_an_exit_code(longspan, store: Path) -> None:
    """A script must be able to tell a whole store from a damaged one."""
    assert longspan("data verify store").code == 0
    shard = store / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    outcome = longspan("data verify store")
    assert outcome.code == 2 and "problem: shard.00000.mds has" in outcome.out
    found = json.loads(longspan("data verify store --json").out)
    assert found["is_whole"] is False and len(found["problems"]) == 1


@pytest.mark.parametrize("out", ["train", "train=x", "=0.5"])
def test_a_split_that_is_not_written_right(longspan, store: Path, out: str) -> None:
    """The message shows the form of this option, not of another."""
    outcome = longspan(["data", "split", "store", "--out", out])
    assert outcome.code == 2 and "--out is written PART=SHARE" in outcome.err


def test_a_split_is_mixed_and_packed_without_a_copy(longspan, store: Path) -> None:
    """Parts are plans: together they hold every token, and `mix` and `pack` stay inside of one."""
    found = json.loads(longspan("data split store --out train=0.7,test=0.3 --json").out)
    assert [part["plan"] for part in found] == ["train", "test"]
    assert sum(part["tokens"] for part in found) == TokenStore(store).num_tokens
    assert not list(Path("train").glob("*.mds"))
    packed = json.loads(longspan("data pack test --length 256 --out rows --json").out)
    assert packed["tokens_in"] == found[1]["tokens"]
    mixed = longspan("data mix test --mode none --out mixed --json")
    assert mixed.code == 0, mixed.err
    assert json.loads(mixed.out)["tokens"] == found[1]["tokens"]
    for inputs in ("train test", "mixed store"):
        outcome = longspan(f"data mix {inputs} --mode none --out other")
        assert outcome.code == 2 and "data split" in outcome.err
    outcome = longspan("data split store store --out a=0.5,b=0.5 --materialize")
    assert outcome.code == 2 and "one store" in outcome.err


def test_a_folder_says_how_it_was_made(longspan, store: Path) -> None:
    """What a command wrote could not be made again without the command line."""
    assert longspan("data mix store@1 --keep-short 0.5 --tokens 3k --seed 3 --out mixture").code == 0
    assert longspan("data pack mixture --length 64 --specials both --by-source --seed 5 --out rows").code == 0
    assert longspan("data mix --settings mixture --out mixture-again").code == 0
    assert longspan("data pack --settings rows --workers 2 --out rows-again").code == 0
    for name in ("mixture", "rows"):
        files = [file.name for file in Path(name).iterdir()]
        assert {"head.json", "settings.yaml"} <= set(files)
        for file in files:
            assert Path(f"{name}-again", file).read_bytes() == Path(name, file).read_bytes(), file
    other = longspan("data pack --settings rows --length 32 --json --out other")
    spec = PackPlan.load("other").spec
    assert other.code == 0 and (spec.length, spec.by_source) == (32, True)
    assert longspan("data convert rows --to mds --workers 2 --out mds").code == 0
    assert longspan("data convert --settings mds --out mds-again").code == 0
    assert Path("mds-again/settings.yaml").read_bytes() == Path("mds/settings.yaml").read_bytes()
    assert longspan("data verify mds").code == 0
    wrong = longspan("data pack --settings mixture --out wrong")
    assert wrong.code == 2 and "no such setting" in wrong.err
