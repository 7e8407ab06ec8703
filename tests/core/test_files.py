"""Files are whole or absent: under exceptions, kill -9 and a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from longspan.core.errors import DataError, RunError
from longspan.core.files import (
    atomic_dir,
    atomic_write,
    read_json,
    remove_leftovers,
    sha256_bytes,
    sha256_file,
    write_json,
)
from tests.patience import PATIENCE_SECONDS


def python(code: str, *arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in another process; `limit` is the largest file in bytes that it may write."""
    prologue = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" if limit else ""
    )
    return subprocess.run(
        [sys.executable, "-c", prologue + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def test_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert os.listdir(path.parent) == ["a.bin"]


def test_exception_keeps_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path, "w") as file:
        file.write("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_kill_keeps_the_old_content_and_the_leftover_can_be_removed(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    done = python(
        """
        import os, signal, sys
        from longspan.core.files import atomic_write
        with atomic_write(sys.argv[1]) as file:
            file.write(b"n" * 1_000_000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2  # the leftover is really there
    assert len(remove_leftovers(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["a.bin"]


def test_full_disk_is_one_message_and_leaves_nothing(tmp_path):
    """A file size limit stands in for the full disk: the system takes 4096 bytes and refuses the rest."""
    done = python(
        """
        import sys
        from longspan.core.errors import RunError
        from longspan.core.files import atomic_write
        try:
            with atomic_write(sys.argv[1]) as file:
                for _ in range(100):
                    file.write(b"x" * 1000)
        except RunError as error:
            print(error)
        """,
        tmp_path / "a.bin",
        limit=4096,
    )
    assert done.stderr == ""
    assert "cannot write" in done.stdout and "free space" in done.stdout
    assert os.listdir(tmp_path) == []


def test_full_disk_inside_a_directory_leaves_nothing(tmp_path):
    done = python(
        """
        import sys
        from longspan.core.errors import RunError
        from longspan.core.files import atomic_dir
        try:
            with atomic_dir(sys.argv[1]) as folder:
                (folder / "small").write_bytes(b"x")
                (folder / "large").write_bytes(b"x" * 5000)
        except RunError as error:
            print(error)
        """,
        tmp_path / "out",
        limit=4096,
    )
    assert done.stderr == ""
    assert "cannot write" in done.stdout
    assert os.listdir(tmp_path) == []


def test_full_disk_in_a_library_written_in_rust(tmp_path):
    """safetensors raises an error of its own on a full disk; a checkpoint ended in a traceback."""
    with pytest.raises(RunError, match="free space") as caught, atomic_dir(tmp_path / "out"):
        raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "found: No space left on device" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["file/below", "folder"])
def test_impossible_place_is_one_message(tmp_path, name):
    """`--out` below a file, or onto a folder, ended in a traceback."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(RunError, match="choose another place"), atomic_write(tmp_path / name) as file:
        file.write(b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_other_errors_pass_through(tmp_path):
    """Only refusals of the disk are translated; a missing input inside the block is something else."""
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        open(tmp_path / "missing")  # noqa: SIM115


def test_directory_appears_whole(tmp_path):
    with atomic_dir(tmp_path / "deep" / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        (folder / "link").symlink_to("nowhere")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "sub" / "a").read_text() == "1"
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_existing_directory_is_refused_before_any_work(tmp_path):
    """The refusal came from the final rename, after the work was done, and as a bare OSError."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(RunError, match="already exists"), atomic_dir(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert os.listdir(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("fails", [False, True])
def test_replacing_a_directory(tmp_path, fails):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    try:
        with atomic_dir(tmp_path / "out", replace=True) as folder:
            (folder / "b").write_text("new")
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert os.listdir(tmp_path / "out") == (["a"] if fails else ["b"])
    assert os.listdir(tmp_path) == ["out"]


def test_kill_between_the_two_renames_loses_nothing(tmp_path):
    """Replacing is two renames; killed between them, the old folder was thrown away as a leftover."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    done = python(
        """
        import os, signal, sys
        from longspan.core import files
        rename, count = os.replace, 0
        def replace(*arguments):
            global count
            count += 1
            if count == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*arguments)
        os.replace = replace
        with files.atomic_dir(sys.argv[1], replace=True) as folder:
            (folder / "b").write_text("new")
        """,
        out,
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "a").read_text() == "old"


def test_leftovers_of_others_stay(tmp_path):
    """Only names that we make ourselves are removed, and only for the name asked for."""
    keep = [".bashrc.tmp", ".other.0123abcd.tmp", "x.tmp", ".note.old", ".a.zzzzzzzz.tmp"]
    for name in [*keep, ".a.0123abcd.tmp"]:
        (tmp_path / name).write_text("")
    assert [path.name for path in remove_leftovers(tmp_path, "a")] == [".a.0123abcd.tmp"]
    assert sorted(os.listdir(tmp_path)) == sorted(keep)


def test_json_round_trip_and_nan_is_null(tmp_path):
    """NaN is not JSON: a report in a browser would fail to load a file that holds it."""
    write_json(tmp_path / "a.json", {"a": [1, None, "\u00e9", float("inf")]})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, "\u00e9", None]}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1} x', b"\xff\xfe\xff"])
def test_broken_json_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_missing_json_and_a_folder_in_its_place(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a") == sha256_bytes(b"abc") == known


def test_errors_name_the_place_that_was_asked_for(tmp_path: Path) -> None:
    """An error inside named the temporary folder, which was gone when it was read."""
    with pytest.raises(DataError, match=r"out/x is bad"), atomic_dir(tmp_path / "out") as aside:
        raise DataError(f"{aside}/x is bad")
    with pytest.raises(RunError) as raised, atomic_dir(tmp_path / "out") as aside:
        (aside / "file").write_text("")
        (aside / "file" / "below").mkdir()
    assert ".tmp" not in str(raised.value) and f"{tmp_path}/out/file/below" in str(raised.value)


def test_names_that_are_not_utf8_come_back_from_json(tmp_path: Path) -> None:
    """A manifest that names a file whose name is not UTF-8 could not be written."""
    name = os.fsdecode(b"caf\xe9 \xc3\xa9")
    write_json(tmp_path / "a.json", {name: [name]})
    assert read_json(tmp_path / "a.json") == {name: [name]}
    (tmp_path / "a.json").read_text(encoding="utf-8")
