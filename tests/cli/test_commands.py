"""Commands: results on stdout, JSON for machines, mistakes in one message, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longspan.data.plans.mixture import MixturePlan
from longspan.data.plans.packing import PackPlan
from tests.patience import PATIENCE_SECONDS

TOKENIZE = "data tokenize texts --tokenizer tokenizer --out store"


def test_lengths_as_json(longspan, store):
    outcome = longspan("data lengths store --json")
    summary = json.loads(outcome.out)
    assert outcome.code == 0
    assert sum(source["documents"] for source in summary["sources"].values()) == len(os.listdir("texts"))


def test_lengths_as_a_table_name_every_source(longspan, store):
    summary = json.loads(longspan("data lengths store --json").out)
    text = longspan("data lengths store").out
    assert all(source in text for source in summary["sources"])
    assert "total" in text


def test_tokenizing_again_keeps_the_store(longspan, store):
    before = os.stat("store/longspan.json").st_mtime_ns
    outcome = longspan(TOKENIZE)
    assert outcome.code == 0
    assert os.stat("store/longspan.json").st_mtime_ns == before


def test_mix_then_pack_counts_every_token(longspan, store):
    mixed = json.loads(longspan("data mix store --mode none --tokens 20k --seed 3 --out mixture --json").out)
    packed = json.loads(
        longspan("data pack mixture --length 512 --specials both --remainder pad --out rows --json").out
    )
    assert packed["tokens_in"] == mixed["tokens"]
    assert packed["tokens_in"] == packed["tokens_packed"] + sum(packed["dropped"].values())
    total = packed["tokens_packed"] + packed["special_tokens"] + packed["padding_tokens"]
    assert packed["rows"] * 512 == total
    assert MixturePlan.load("mixture").fingerprint == mixed["fingerprint"]
    assert PackPlan.load("rows").fingerprint == packed["fingerprint"]


def test_plans_remember_their_stores_from_any_folder(longspan, store, monkeypatch):
    """A relative path in a plan is lost as soon as the reader stands elsewhere."""
    assert longspan("data mix store --mode none --out mixture").code == 0
    place = os.path.abspath("mixture")
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    outcome = longspan(["data", "pack", place, "--length", "256", "--out", "rows", "--json"])
    assert outcome.code == 0, outcome.err
    assert longspan("data peek rows --json").code == 0


def test_pack_takes_stores_whole(longspan, store):
    packed = json.loads(longspan("data pack store --length 256 --out rows --json").out)
    lengths = json.loads(longspan("data lengths store --json").out)
    assert packed["tokens_in"] == sum(source["tokens"] for source in lengths["sources"].values())


def test_peek_shows_the_text_of_a_row(longspan, store):
    longspan("data pack store --length 256 --out rows")
    peeked = json.loads(longspan("data peek rows --index 2 --tokenizer tokenizer --json").out)
    assert sum(span["tokens"] for span in peeked["spans"]) == 256
    assert all(span["text"] for span in peeked["spans"])
    assert "row 2" in longspan("data peek rows --index 2").out
    longspan("data pack store --length 100000 --remainder pad --out padded")
    padding = json.loads(longspan("data peek padded --json").out)["spans"][-1]
    assert (padding["source"], padding["document"]) == ("padding", None)
    assert "4294967295" not in longspan("data peek padded --tokenizer tokenizer").out


def test_peek_shows_a_document_and_a_mixture(longspan, store):
    found = json.loads(longspan("data peek store --index 1 --tokenizer tokenizer --json").out)
    assert any(path.read_text().startswith(found["text"][:200]) for path in Path("texts").iterdir())
    assert longspan("data peek store").code == 0
    longspan("data mix store --mode none --out mixture")
    assert "mixture" in longspan("data peek mixture").out


def test_peek_shows_what_is_learnt(longspan, store):
    """Tokens that are only read were counted as weighted, and where an answer ends could not be seen."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "WRONG", "weight": 0}]
    turns += [{"role": "user", "content": "no"}, {"role": "assistant", "content": "RIGHT"}]
    Path("chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    Path("chat.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    )
    command = "data tokenize chat.jsonl --tokenizer tokenizer --chat-template chat.jinja --out talk"
    assert longspan(command).code == 0
    found = json.loads(longspan("data peek talk --tokenizer tokenizer --json").out)
    (learnt,) = found["learnt"]
    assert (found["learnt_tokens"], found["weighted_tokens"]) == (learnt["tokens"], 0)
    assert learnt["text"].strip().startswith("RIGHT") and learnt["text"].endswith(learnt["last_token"])
    shown = longspan("data peek talk --tokenizer tokenizer").out
    assert "ends with" in shown and repr(learnt["last_token"]) in shown and "green: learnt" in shown
    # Packed whole, without a strategy.
    assert longspan("data pack talk --length 256 --out rows").code == 0
    span = json.loads(longspan("data peek rows --tokenizer tokenizer --json").out)["spans"][0]
    assert (span["learnt_tokens"], span["tokens"]) == (learnt["tokens"], found["tokens"])
    assert span["learnt"] == [{key: value for key, value in learnt.items() if key != "text"}]
    assert "learnt of document 0" in longspan("data peek rows --tokenizer tokenizer").out


def test_weights_are_read_up_to_the_last_equals_sign(longspan, store):
    source = next(iter(json.loads(longspan("data lengths store --json").out)["sources"]))
    outcome = longspan(
        [
            "data",
            "mix",
            "store",
            "--mode",
            "proportions",
            "--weight",
            f"{source}=1",
            "--tokens",
            "2k",
            "--out",
            "m",
        ]
    )
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("data lengths nowhere", ["nowhere is not a token store", "longspan data tokenize"]),
        ("data tokenize nowhere --tokenizer tokenizer --out s", ["nowhere"]),
        ("data tokenize texts --tokenizer nowhere/at/all --out s", ["nowhere/at/all"]),
        ("data mix store --mode fast --out m", ["the command line is not valid", "mode", "per_source"]),
        ("data mix store --tokens 1,5B --out m", ["tokens", "1,5B"]),
        ("data mix store --weight half --out m", ["NAME=NUMBER", "half"]),
        ("data mix store --out texts", ["texts", "exists"]),
        ("data pack store --length 12q --out r", ["length", "12q", "128k"]),
        ("data peek store --index 9999", ["no such document", "9999"]),
        ("train nowhere.yaml", ["nowhere.yaml does not exist"]),
        ("train recipe.yaml --set modle.dtype=bfloat16 --dry-run", ["modle", "did you mean 'model'"]),
        ("train recipe.yaml --set stages.3.lr=1 --dry-run", ["stages.3.lr", "allowed: 0 to 0"]),
        ("eval needle --model m --data texts --lengths 4q --out r", ["lengths", "4q"]),
        (
            "eval ppl --model texts --data texts --lengths 64 --out r",
            ["texts has no tokenizer.json", "--tokenizer"],
        ),
        ("report nowhere", ["nowhere"]),
        ("quickstart --set colour=1 --out q", ["colour"]),
    ],
)
def test_mistakes_are_one_message(longspan, store, arguments, parts):
    """No traceback, nothing on stdout, exit code 2, and the message names the place."""
    outcome = longspan(arguments)
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    message = outcome.err[outcome.err.index("error: ") :]
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "arguments", ["nonsense", "data", "data lengths", "data pack store --length", "data mix --weigth 1 store"]
)
def test_wrong_use_is_exit_code_2(longspan, arguments):
    outcome = longspan(arguments)
    assert outcome.code == 2
    assert "Error: " in outcome.err or "Usage: longspan" in outcome.out + outcome.err


def test_bugs_keep_their_traceback(longspan, monkeypatch):
    """Only errors that we raise on purpose lose it."""
    from longspan.cli import doctor

    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(doctor, "examine", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        longspan("doctor")


def test_full_disk_is_exit_code_1(longspan, monkeypatch):
    from longspan.cli import doctor
    from longspan.core.errors import RunError

    def full() -> None:
        raise RunError("cannot write x", fix="free space")

    monkeypatch.setattr(doctor, "examine", full)
    outcome = longspan("doctor")
    assert (outcome.code, outcome.err) == (1, "error: cannot write x\n  to mend it: free space\n")


WAIT = """
import sys, time
from longspan.cli import doctor, main
def examine():
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
doctor.examine = examine
sys.argv = ["longspan", "doctor"]
main.run()
"""


def test_interrupt_is_exit_code_130():
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell inherit an interrupt that is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_reader_that_goes_away_leaves_no_complaint(store):
    """`longspan ... | head -1`: Python complains about the broken pipe at its end unless told not to."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "longspan", "data", "lengths", "store"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--world 2", "--certify"),
        ("--layers gdn", "--certify"),
        ("--certify --layers rwkv", "mamba2, mamba1"),
    ],
)
def test_what_is_to_be_proved_needs_the_proof(longspan, asked, said):
    """--world 2 without --certify proved nothing and said nothing."""
    outcome = longspan(f"doctor {asked}")
    assert outcome.code == 2 and said in outcome.err


def test_doctor_as_json(longspan):
    outcome = longspan("doctor --json")
    report = json.loads(outcome.out)
    assert outcome.code == 0
    assert report["packages"]["torch"]
    kernels = {(kernel["kernel"], kernel["device"]): kernel for kernel in report["attention"]}
    assert kernels["reference", "cpu"]["usable"]
    assert all(kernel["reason"] for kernel in kernels.values())
    assert sum(kernel["chosen"] for kernel in kernels.values() if kernel["device"] == "cpu") == 1
    assert report["tokenizer"]["backend"] in ("gigatoken", "hf")


def test_doctor_says_what_is_missing_instead_of_failing():
    """On a machine without torch and gigatoken the doctor still answers; that is when it is asked."""
    code = """
import importlib.metadata, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "gigatoken", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
version = importlib.metadata.version
def found(package):
    if package in {"torch", "gigatoken", "transformers"}:
        raise importlib.metadata.PackageNotFoundError(package)
    return version(package)
importlib.metadata.version = found
from longspan.cli.main import run
sys.argv = ["longspan", "doctor", *sys.argv[1:]]
run()
"""
    for arguments in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "torch" in done.stdout
    report = json.loads(done.stdout)
    assert report["packages"]["torch"] is None
    assert "No module named" in report["attention"]["problem"]
    assert report["tokenizer"]["backend"] == "hf"


def test_version_and_help(longspan):
    assert longspan("--version").out.startswith("longspan ")
    assert "Commands:" in longspan("--help").out


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("2e1", 0, ""),
        ("0.02k", 0, ""),
        ("1.5", 2, "whole number"),
        ("0", 2, "--samples: Input should be greater than 0"),
        ("two", 2, "not a count"),
    ],
)
def test_counts_are_read_as_people_write_them(
    longspan, word: str, code: int, said: str, tmp_path: Path
) -> None:
    """Other projects say 2e6 samples; a number that is none gets one message."""
    command = f"eval passkey --model m --tokenizer {tmp_path} --samples {word} --out {tmp_path / 'r'} --help"
    outcome = longspan(command.removesuffix(" --help") if code else command)
    assert outcome.code == code and said in outcome.err
