"""A run is planned once: by a dry run, and by a real one before its first step."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from longspan.core.errors import DataError
from longspan.models.hf import build_model, save_model
from longspan.train import run_plan, streams, trainer
from longspan.train.config import TrainConfig
from longspan.train.resolve import resolve
from tests.train.conftest import recipe

_counters: list[Counter[str]] = []


def _on_open(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str | Path):
        for counter in _counters:
            counter[f"{Path(args[0]).parent.name}/{Path(args[0]).name}"] += 1


@pytest.fixture(scope="module", autouse=True)
def _listening() -> None:
    # A hook of the interpreter stays until its end; between tests it counts nothing.
    sys.addaudithook(_on_open)


class Stopped(Exception):
    """Instead of the first step."""


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stopped


@contextmanager
def opens() -> Iterator[Counter[str]]:
    """Count the opens of files by folder and name, whoever makes them."""
    _counters.append(Counter())
    try:
        yield _counters[-1]
    finally:
        _counters.clear()


@pytest.fixture(scope="module")
def model(data_root: Path) -> str:
    made = build_model(recipe()["model"]["hf_config"], seed=0)
    save_model(made, data_root / "pretrained", tokenizer=data_root / "tokenizer")
    return "pretrained"


def test_a_recipe_reads_each_store_config_and_validation_set_once(
    data_root: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check once read for itself what others had read: a slow disk was waited for again and again."""
    calls: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    counted(streams, "plan_mixture")
    counted(streams, "plan_packing")
    counted(run_plan, "plan_validation")
    validation = {"stores": {"held": "plain"}, "lengths": [16], "windows": 2, "every_steps": 100}
    config = TrainConfig.from_dict(recipe(model={"path": model}, validation=validation))

    def check(read: Counter[str]) -> None:
        once = ("pretrained/config.json", "plain/longspan.json", "weighted/longspan.json")
        assert {name: read[name] for name in once} == dict.fromkeys(once, 1)
        assert calls == {"plan_mixture": 4, "plan_packing": 4, "plan_validation": 1}

    with opens() as read:
        resolve(config, "recipe.yaml", data_root=data_root)
    check(read)
    calls.clear()
    monkeypatch.setattr(trainer, "train_step", stop)
    with opens() as read, pytest.raises(Stopped):
        trainer.train(config, tmp_path / "run", data_root=data_root)
    check(read)


def test_a_run_goes_on_with_the_model_and_the_data_that_it_began_with(
    data_root: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data of the stage under way were checked; those of a later stage, or the RoPE below a name, were not."""
    for name in ("pretrained", "tokenizer", "plain", "weighted"):
        shutil.copytree(data_root / name, tmp_path / name)
    config = TrainConfig.from_dict(recipe(model={"path": model}))
    monkeypatch.setattr(trainer, "train_step", stop)

    def start() -> None:
        trainer.train(config, tmp_path / "run", data_root=tmp_path)

    for _ in range(2):
        with pytest.raises(Stopped):
            start()
    settings = tmp_path / "pretrained" / "config.json"
    saved = settings.read_text()
    fields = json.loads(saved)
    settings.write_text(
        json.dumps({**fields, "rope_parameters": {**fields["rope_parameters"], "rope_theta": 7.0}})
    )
    with pytest.raises(DataError, match=r"began with another model(.|\n)*7\.0"):
        start()
    settings.write_text(saved)
    shutil.rmtree(tmp_path / "weighted")
    shutil.copytree(tmp_path / "plain", tmp_path / "weighted")
    with pytest.raises(DataError, match="began with other data in stage 'short'"):
        start()


def test_a_dry_run_says_which_memory_settings_are_chosen(data_root: Path, model: str) -> None:
    """`memory: auto` was estimated as if nothing had been chosen."""
    config = TrainConfig.from_dict(recipe(model={"path": model}, memory="auto"))
    shown = resolve(config, "recipe.yaml", data_root=data_root, gpu="h100")
    assert any(note.startswith("memory: none; ") for note in shown.notes)
