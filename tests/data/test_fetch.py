"""Downloads: whole or absent, continued where they stopped, never a mixture of two versions."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from longspan.core.errors import DataError, LongspanError, RunError
from longspan.data.readers import fetch as module
from longspan.data.readers import read_documents
from longspan.data.readers.fetch import fetch
from tests.data.hub_stand_in import hub_at
from tests.patience import PATIENCE_SECONDS

CONTENT = {
    "data/train-00000-of-00002.jsonl": b'{"text": "one"}\n' * 500,
    "data/train-00001-of-00002.jsonl": b'{"text": "two"}\n' * 300,
    "data/test-00000-of-00001.jsonl": b'{"text": "test"}\n' * 10,
    "README.md": b"about",
    ".gitattributes": b"hidden",
}


class Flaky(MemoryFileSystem):
    """A store of its own whose reads break off after so many bytes, and that counts what was read."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012 (so fsspec's memory store is made)
    pseudo_dirs = [""]  # noqa: RUF012
    left: int | None = None
    num_read = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        found = super().info(path, **kwargs)
        if found["type"] == "file":
            found["ETag"] = f'"{hash(self.store[found["name"]].getvalue())}"'
        return found

    def find(self, path: str, **kwargs: Any) -> Any:
        return {name: self.info(name) for name in super().find(path)}

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        stream = super().open(path, mode, **kwargs)
        if mode != "rb":
            return stream
        kind = type(self)

        class Cut:
            def __enter__(self) -> Cut:
                return self

            def __exit__(self, *exc: object) -> None:
                pass

            def seek(self, place: int) -> None:
                stream.seek(place)

            def read(self, size: int) -> bytes:
                if kind.left is not None:
                    if kind.left <= 0:
                        raise ConnectionResetError("the line is dead")
                    size = min(size, kind.left)
                    kind.left -= size
                block = stream.read(size)
                kind.num_read += len(block)
                return block

        return Cut()


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.clear_instance_cache()
    Flaky.store, Flaky.pseudo_dirs, Flaky.left, Flaky.num_read = {}, [""], None, 0
    filesystem = fsspec.filesystem("flaky")
    for name, data in CONTENT.items():
        filesystem.pipe_file(f"/set/{name}", data)
    monkeypatch.setattr(module, "_pause", lambda seconds: None)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    yield Flaky
    Flaky.clear_instance_cache()


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != module.MANIFEST
    }


VISIBLE = {name: data for name, data in CONTENT.items() if not name.startswith(".")}


def test_everything_below_an_address(tmp_path: Path, flaky: type[Flaky]) -> None:
    """Guards against lost files, flattened folders, hidden files, and rubbish left beside them."""
    report = fetch("flaky://set", tmp_path / "out")
    assert contents(tmp_path / "out") == VISIBLE
    assert report.files == report.fetched_files == 4
    assert report.bytes == report.fetched_bytes == sum(map(len, VISIBLE.values()))
    again = fetch("flaky://set", tmp_path / "out")
    assert (again.files, again.fetched_files, again.fetched_bytes) == (4, 0, 0)
    manifest = json.loads((tmp_path / "out" / module.MANIFEST).read_text())
    assert manifest["source"] == "flaky://set" and len(manifest["files"]) == 4
    # On a web server a folder is known by its slash alone.
    assert fetch("flaky://set/data/", tmp_path / "slash").files == 3
    assert "train-00000-of-00002.jsonl" in contents(tmp_path / "slash")
    one = fetch("flaky://set/README.md", tmp_path / "one")
    assert one.files == 1 and contents(tmp_path / "one") == {"README.md": b"about"}


def test_patterns(tmp_path: Path, flaky: type[Flaky]) -> None:
    """Guards against a pattern that matches names or paths but not both, and one that matches nothing."""
    fetch("flaky://set", tmp_path / "a", include=["train-*"])
    assert len(contents(tmp_path / "a")) == 2
    fetch("flaky://set", tmp_path / "b", include=["data/*", "*.md"])
    assert contents(tmp_path / "b") == VISIBLE
    with pytest.raises(DataError, match=r"no file that matches \*\.parquet at flaky://set"):
        fetch("flaky://set", tmp_path / "c", include=["*.parquet"])


def test_goes_on_after_the_network_died(tmp_path: Path, flaky: type[Flaky]) -> None:
    """Guards against bytes being fetched twice, or half a file standing under its name."""
    flaky.left = 5500
    with pytest.raises(RunError, match=r"could not be fetched(.|\n)*the line is dead(.|\n)*same command"):
        fetch("flaky://set", tmp_path / "out", num_workers=1)
    whole = {name for name in contents(tmp_path / "out") if not Path(name).name.startswith(".")}
    assert all((tmp_path / "out" / name).read_bytes() == VISIBLE[name] for name in whole)
    assert not (tmp_path / "out" / module.MANIFEST).exists()
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.part")) > 0
    flaky.left = None
    fetch("flaky://set", tmp_path / "out", num_workers=1)
    assert contents(tmp_path / "out") == VISIBLE
    assert flaky.num_read == sum(map(len, VISIBLE.values())), "no byte came twice"


def test_short_breaks_are_waited_out(
    tmp_path: Path, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against one dropped connection ending hours of download."""
    flaky.left = 3000
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        flaky.left = 3000

    monkeypatch.setattr(module, "_pause", pause)
    with caplog.at_level(logging.WARNING):
        fetch("flaky://set", tmp_path / "out", num_workers=1)
    assert contents(tmp_path / "out") == VISIBLE and len(pauses) >= 3
    assert "the line is dead; trying again" in caplog.text
    assert flaky.num_read == sum(map(len, VISIBLE.values()))


def test_a_part_of_another_version_is_not_continued(tmp_path: Path, flaky: type[Flaky]) -> None:
    """Guards against the head of the old file and the tail of the new one being joined."""
    flaky.left = 2500
    with pytest.raises(RunError):
        fetch("flaky://set", tmp_path / "out", include=["*00000-of-00002*"])
    flaky.left = None
    new = bytes(reversed(CONTENT["data/train-00000-of-00002.jsonl"]))
    fsspec.filesystem("flaky").pipe_file("/set/data/train-00000-of-00002.jsonl", new)
    fetch("flaky://set", tmp_path / "out", include=["*00000-of-00002*"])
    assert contents(tmp_path / "out") == {"data/train-00000-of-00002.jsonl": new}


def test_changed_file_is_fetched_again(tmp_path: Path, flaky: type[Flaky]) -> None:
    """Guards against a file of the same size but other content, or a damaged copy, being taken as current."""
    fetch("flaky://set", tmp_path / "out")
    fsspec.filesystem("flaky").pipe_file("/set/README.md", b"ABOUT")
    (tmp_path / "out/data/test-00000-of-00001.jsonl").write_bytes(b"cut")
    report = fetch("flaky://set", tmp_path / "out")
    assert report.fetched_files == 2
    assert contents(tmp_path / "out") == {**VISIBLE, "README.md": b"ABOUT"}


def test_source_without_versions_begins_parts_again(tmp_path: Path, flaky: type[Flaky]) -> None:
    """Guards against continuing a file when nothing tells whether it is still the same."""
    name = "data/train-00000-of-00002.jsonl"
    old = tmp_path / "out" / name
    old.parent.mkdir(parents=True)
    file = module.RemoteFile(f"/set/{name}", name, len(CONTENT[name]), None)

    class Bar:
        def advance(self, amount: int = 1) -> None:
            pass

        def note(self, text: str) -> None:
            pass

    flaky.left = 3000
    with pytest.raises(Exception, match="the line is dead"):
        module._fetch_file(fsspec.filesystem("flaky"), file, tmp_path / "out", Bar())
    assert len(list(old.parent.iterdir())) == 1
    flaky.left = None
    size, new = module._fetch_file(fsspec.filesystem("flaky"), file, tmp_path / "out", Bar())
    assert size == new == len(CONTENT[name]) and old.read_bytes() == CONTENT[name]


def test_what_stands_at_out(tmp_path: Path, flaky: type[Flaky]) -> None:
    """Guards against a download being mixed into a folder of something else."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(DataError, match="not empty and not a download"):
        fetch("flaky://set", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    fetch("flaky://set/data", tmp_path / "out")
    with pytest.raises(DataError, match=r"holds another download(.|\n)*flaky://set/data"):
        fetch("flaky://set", tmp_path / "out")


def test_second_download_into_a_folder_stops(tmp_path: Path, flaky: type[Flaky]) -> None:
    """Guards against two processes writing the same parts."""
    (tmp_path / "out").mkdir()
    with module._locked(tmp_path / "out"), pytest.raises(DataError, match="another download into"):
        fetch("flaky://set", tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "a\\b", ""])
def test_names_that_lead_out_are_refused(name: str) -> None:
    """Guards against a source writing over files elsewhere on this machine."""
    with pytest.raises(DataError, match="leads out of the folder"):
        module._remote_file({"name": f"set/{name}", "type": "file", "size": 1}, "set")


def test_announced_hash_is_checked(
    tmp_path: Path, flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against damage on the way going unnoticed where the hub announces a SHA-256."""
    plain = Flaky.info

    def info(self: Flaky, path: str, **kwargs: Any) -> dict[str, Any]:
        return {**plain(self, path, **kwargs), "lfs": {"sha256": "0" * 64}}

    monkeypatch.setattr(Flaky, "info", info)
    with pytest.raises(DataError, match="came damaged"):
        fetch("flaky://set/README.md", tmp_path / "out")
    assert contents(tmp_path / "out").keys() <= {module.JOURNAL}


def test_unknown_addresses(tmp_path: Path) -> None:
    """Guards against tracebacks of other packages for a typing mistake or a package that is not there."""
    for source, message in {
        "nosuch://x": "Protocol not known",
        "memory://not-there": "cannot list memory://not-there",
        str(tmp_path / "nothing"): "cannot list",
        "hf://name-alone": "not the address of a data set",
    }.items():
        with pytest.raises(LongspanError, match=message):
            fetch(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hub_data_set_or_a_split_of_it(tmp_path: Path) -> None:
    """Guards against a split bringing everything, and against files that readers would not find again."""
    for name, data in CONTENT.items():
        path = tmp_path / "hub/datasets/org/set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with hub_at(tmp_path / "hub"):
        assert fetch("hf://org/set", tmp_path / "all").files == 4
        assert fetch("hf://org/set/train", tmp_path / "train").files == 2
        assert fetch("hf://org/set/data", tmp_path / "data").files == 3
    assert contents(tmp_path / "all") == VISIBLE
    assert [d.source for d in read_documents([tmp_path / "train"])] == ["data"] * 800


def test_a_model_or_an_adapter_comes_to_a_folder(tmp_path: Path) -> None:
    """Models stand beside data sets of the same name on the hub; the wrong one must not come, nor what is left out."""
    names = ("config.json", "model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth")
    for name in (*names, ".gitattributes"):
        path = tmp_path / "hub/org/model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "hub/datasets/org/model").mkdir(parents=True)
    (tmp_path / "hub/datasets/org/model/rows.jsonl").write_bytes(b"rows")
    with hub_at(tmp_path / "hub"):
        assert fetch("hf://org/model", tmp_path / "all", kind="model").files == 4
        assert (
            fetch("org/model", tmp_path / "named", kind="model", exclude=["*.bin", "original/*"]).files == 2
        )
        assert set(contents(tmp_path / "named")) == {"config.json", "model.safetensors"}
        again = fetch("org/model", tmp_path / "named", kind="model", exclude=["*.bin", "original/*"])
        assert again.fetched_files == 0
        with pytest.raises(DataError, match="another download"):
            fetch("org/model", tmp_path / "named", kind="model")
        assert set(contents(tmp_path / "all")) == set(names)
        assert fetch("hf://org/model", tmp_path / "data").files == 1
        with pytest.raises(DataError, match=r"no file that matches \*\.bin but not pytorch"):
            fetch("org/model", tmp_path / "x", kind="model", include=["*.bin"], exclude=["pytorch*"])


def test_options_reach_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against --storage-option requester_pays=true being read and forgotten."""
    seen: dict[str, Any] = {}

    class Paying(MemoryFileSystem):
        protocol = "paying"
        cachable = False

        def __init__(self, **options: Any) -> None:
            super().__init__()
            seen.update(options)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return MemoryFileSystem._strip_protocol(path.replace("paying://", "memory://"))

    fsspec.register_implementation("paying", Paying, clobber=True)
    with pytest.raises(DataError):
        fetch("paying://not-there", tmp_path / "out", storage_options={"requester_pays": True})
    assert seen == {"requester_pays": True}


KILLED = """
import os, signal, sys
from longspan.data.readers import fetch

fetch.BLOCK_BYTES = 1000
advance = fetch.progress

class Killer:
    count = 0
    def advance(self, amount=1):
        Killer.count += 1
        if Killer.count == 9:
            os.kill(os.getpid(), signal.SIGKILL)

from contextlib import contextmanager
@contextmanager
def progress(*args, **kwargs):
    yield Killer()

fetch.progress = progress
fetch.fetch(sys.argv[1], sys.argv[2], num_workers=1)
"""


def test_killed_download_goes_on(tmp_path: Path) -> None:
    """Guards against kill -9 leaving a folder that passes for whole, or that cannot be continued."""
    for name, data in CONTENT.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    arguments = [str(tmp_path / "set"), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out" / module.MANIFEST).exists()
    assert len(list((tmp_path / "out").rglob("*.part"))) == 1
    report = fetch(*arguments)
    assert contents(tmp_path / "out") == VISIBLE
    assert 0 < report.fetched_bytes < report.bytes
    assert [path.name for path in (tmp_path / "out").rglob(".*")] == [module.MANIFEST]
