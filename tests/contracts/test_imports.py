"""Rooms import only downward, and light rooms stay light.

The table is the one in docs/architecture.md; a change of either is a change of both.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import longspan
from tests.patience import PATIENCE_SECONDS

PACKAGE = Path(longspan.__file__).parent
ARCHITECTURE = PACKAGE.parents[1] / "docs" / "architecture.md"

ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "api": {"core"},
    "plan": {"core"},
    "report": {"core", "eval"},
    "synth": {"core", "data", "api"},
    "kernels": {"core"},
    "parallel": {"core", "kernels"},
    "models": {"core", "plan", "kernels", "parallel"},
    "infer": {"core", "data", "api", "kernels", "parallel", "models"},
    "train": {"core", "data", "plan", "kernels", "parallel", "models"},
    "eval": {"core", "data", "api", "infer"},
    "annotate": {"core", "data", "kernels", "parallel", "models", "infer"},
    "steps": {"core", "data", "api", "parallel", "models", "infer", "train", "eval"},
}
WINGS: dict[str, set[str]] = {
    "store": set(),
    "jobs": set(),
    "texts": set(),
    "tokenizer": set(),
    "readers": {"store"},
    "chat": {"tokenizer"},
    "plans": {"store"},
    "tokenize": {"store", "jobs", "tokenizer", "readers", "chat", "plans"},
    "rows": {"store", "plans"},
    "packed": {"store", "jobs", "readers", "plans", "rows"},
    "exchange": {"store", "readers", "plans", "packed"},
    "audit": {"store", "jobs", "tokenizer", "tokenize"},
    "pairs": {"store", "jobs", "tokenizer", "exchange"},
}
"""The wings of `data`: what each may import. `data/verify.py` stands above them."""
PARTS = {("report", "eval"): {"registry"}}
"""What of a room another may import, where it is not all of it."""
EVERYTHING = {"cli", "quickstart", "__init__", "__main__"}
"""The user's side: may import every room."""
LIGHT = ("core", "data", "api", "plan", "synth", "report")
"""Rooms that work without torch and transformers."""
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())


def imports_of(path: Path) -> set[str]:
    """Return every module that a file imports, at the top, in functions and for type checking."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports are absolute"
            assert node.module is not None
            # `from longspan import data` names a room only in the second part.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_in(names: set[str]) -> set[str]:
    inside = {name.split(".")[1] for name in names if name.startswith("longspan.")}
    return {name for name in inside if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_downward(room):
    if room in EVERYTHING:
        return
    assert room in ALLOWED, f"the room {room} is not in the table"
    for path in (PACKAGE / room).rglob("*.py"):
        wrong = rooms_in(imports_of(path)) - ALLOWED[room] - {room}
        assert not wrong, (
            f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}, allowed: {sorted(ALLOWED[room])}"
        )


@pytest.mark.parametrize(("room", "other"), PARTS)
def test_a_part_of_a_room_is_not_the_whole(room, other):
    """The report reads records: what it knew of evaluations beyond the registry it would compute anew."""
    for path in (PACKAGE / room).rglob("*.py"):
        parts = {name.split(".")[2] for name in imports_of(path) if name.startswith(f"longspan.{other}.")}
        assert parts <= PARTS[room, other], f"{path.relative_to(PACKAGE)} imports {sorted(parts)}"


def wings_in(names: set[str]) -> set[str]:
    inside = {name.split(".")[2] for name in names if name.startswith("longspan.data.")}
    return inside & ({path.name for path in (PACKAGE / "data").iterdir() if path.is_dir()} | {"verify"})


def test_wings_of_data_import_only_downward():
    """A circle between wings would make one wing of them; a file outside of all would escape the table."""
    assert {path.stem for path in (PACKAGE / "data").glob("*.py")} == {"__init__", "verify"}
    assert {path.parent.name for path in (PACKAGE / "data").glob("*/__init__.py")} == set(WINGS)
    order = list(WINGS)
    for wing, allowed in WINGS.items():
        assert allowed <= set(order[: order.index(wing)]), wing
        used = set()
        for path in (PACKAGE / "data" / wing).rglob("*.py"):
            found = wings_in(imports_of(path)) - {wing}
            assert found <= allowed, f"{path.relative_to(PACKAGE)} imports {sorted(found - allowed)}"
            used |= found
        assert used == allowed, f"{wing} no longer imports {sorted(allowed - used)}: mend the table"


def test_files_of_data_do_not_import_in_circles():
    """Two files that need one another are read and changed as one, whatever their names say."""
    needs = {}
    for path in (PACKAGE / "data").rglob("*.py"):
        place = path.relative_to(PACKAGE.parent).with_suffix("")
        needs[".".join(place.parts).removesuffix(".__init__")] = imports_of(path)
    needs = {
        file: {each for name in names for each in (name, name.rpartition(".")[0]) if each in needs}
        - {file}
        # A folder's `__init__` offers what its files hold.
        - {file.rpartition(".")[0]}
        for file, names in needs.items()
    }
    while free := {file for file, others in needs.items() if not others & set(needs)}:
        needs = {file: others for file, others in needs.items() if file not in free}
    assert not needs, f"in circles, or above one: {sorted(needs)}"


def test_the_scan_sees_imports():
    """Guard against the test above passing because it finds nothing."""
    assert "core" in rooms_in(imports_of(PACKAGE / "data" / "store" / "lengths.py"))
    assert rooms_in(imports_of(PACKAGE / "cli" / "data_plan.py")) >= {
        "core",
        "data",
    }  # imports inside functions


def test_nothing_stands_beside_the_rooms():
    """A new file at the top would belong to no room and escape the table."""
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files <= EVERYTHING


def test_the_page_shows_this_table():
    """docs/architecture.md says `room <- rooms` in a block; it must be the table that is enforced."""
    everything = {room: {"everything"} for room in ("cli", "quickstart")}
    assert (
        shown_table("imports")
        == {room: ALLOWED[room] & set(ROOMS) for room in ROOMS if room in ALLOWED} | everything
    )
    assert shown_table("wings") == WINGS | {"verify": {"everything"}}


def shown_table(name: str) -> dict[str, set[str]]:
    """Return the table that a code block of the page shows."""
    block = re.search(rf"```{name}\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.S)
    assert block is not None
    shown = {}
    for line in block.group(1).splitlines():
        room, _, allowed = line.partition("<-")
        shown[room.strip()] = set(allowed.split()) - {"nothing"}
    return shown


BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers"}:
            raise ImportError(f"{name} is blocked by this test")

sys.meta_path.insert(0, Block())
"""


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which importing torch or transformers raises."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def test_the_block_blocks():
    assert "blocked by this test" in run_blocked("import torch").stderr


@pytest.mark.parametrize("room", [room for room in LIGHT if room in ROOMS])
def test_light_rooms_need_neither_torch_nor_transformers(room):
    """Data jobs run on machines without torch, and torch takes seconds to import."""
    code = f"""
        import importlib, pkgutil
        import longspan.{room} as room
        for module in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
            importlib.import_module(module.name)
        """
    done = run_blocked(code)
    assert done.returncode == 0, done.stderr


def test_package_and_help_need_neither_torch_nor_transformers():
    code = """
        import longspan
        dir(longspan), longspan.DataError, longspan.__version__
        from longspan.cli.main import run
        sys.argv = ["longspan", "--help"]
        run()
        """
    done = run_blocked(code)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_options_need_neither_torch_nor_transformers():
    """The help of every command is made of settings, whose modules are imported for it."""
    done = run_blocked("""
        import typer.main
        from longspan.cli.main import app
        print(len(typer.main.get_command(app).commands))
        """)
    assert done.returncode == 0, done.stderr


def test_help_loads_no_heavy_module():
    """`longspan --help` answers at once: it is not the time that is checked but what would take it.

    The help of a command reads its settings, which may need numpy.
    """
    code = """
        import sys
        from longspan.cli.main import run
        heavy = {"torch", "transformers", "pyarrow", "matplotlib", "tokenizers"}
        for words, more in ((["--help"], {"numpy", "pydantic"}), (["data", "mix", "--help"], set())):
            sys.argv = ["longspan", *words]
            try:
                run()
            except SystemExit:
                print("HEAVY", sorted((heavy | more) & set(sys.modules)))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.stdout.count("HEAVY []") == 2, done.stdout + done.stderr


def test_every_recipe_and_template_is_package_data():
    """Files that are not Python travel with the package only if pyproject.toml names them."""
    import tomllib

    settings = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["longspan"]
    known = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    other = {
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }
    assert other <= known, f"not packaged: {sorted(str(path.relative_to(PACKAGE)) for path in other - known)}"
    assert other
