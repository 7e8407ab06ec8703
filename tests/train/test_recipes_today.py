"""The recipes for today's models: what they promise in their first lines holds, without the hub."""

from __future__ import annotations

import importlib.resources
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from transformers import CONFIG_MAPPING, PretrainedConfig

from longspan.cli.main import app
from longspan.data.tokenizer import Tokenizer, train_bpe
from longspan.kernels.rope import check_reach
from longspan.plan.hardware import parse_gpus
from longspan.plan.models import published_configs
from longspan.train.config import TrainConfig
from longspan.train.known_models import KnownModel, known_model
from longspan.train.recipes import load_recipe, scale_tiny
from longspan.train.resolve import resolve
from longspan.train.tiny_model import tiny_model
from tests.train.recipes_today import TODAY

FILES = importlib.resources.files("longspan") / "recipes"
DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"


@pytest.mark.parametrize("name", TODAY)
def test_a_dry_run_fits_the_gpus_that_the_recipe_names(name: str, tmp_path: Path) -> None:
    """Who rents eight cards by a recipe's first line runs out of memory on the first day."""
    promised = TODAY[name]
    config = load_recipe(name).config
    resolved = resolve(config, name, data_root=tmp_path, gpu=promised.gpu)
    assert resolved.processes == promised.processes and name in resolved.launch
    memory = parse_gpus(promised.gpu).gpu.memory
    for stage in resolved.stages:
        # A tenth to spare: the estimate is none of the allocator's fragments.
        assert stage.memory is not None and sum(stage.memory.values()) < 0.9 * memory, stage.name
    row = next(line for line in DOCS.read_text("utf-8").splitlines() if line.startswith(f"| `{name}` |"))
    if shown := re.search(r"(\d+) GB,", row):
        most = max(sum(stage.memory.values()) for stage in resolved.stages if stage.memory is not None)
        assert most == pytest.approx(float(shown[1]) * 1e9, rel=0.1), "the page"
    assert not [note for note in resolved.notes if "its own is trained as it is" in note]
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", TODAY)
def test_stages_are_what_the_page_says(name: str) -> None:
    """Lengths that grow, moments that are carried over, fine-tuning at the end, text that no stage reads."""
    config = load_recipe(name).config
    assert tuple(stage.context_length for stage in config.stages) == TODAY[name].lengths
    grown = [stage for stage in config.stages[1:] if stage.objective == config.stages[0].objective]
    assert all(stage.optimizer_state == "carry" for stage in grown)
    assert config.stages[-1].objective == "sft" and config.validation is not None
    read = {
        path
        for stage in config.stages
        for stream in stage.streams.values()
        for path in ([stream.store] if isinstance(stream.store, str) else stream.store or ())
    }
    assert read.isdisjoint(config.validation.stores.values())


def test_every_command_of_a_recipe_can_be_given() -> None:
    """An option that was renamed would be found out after a day of downloads."""
    root = typer.main.get_command(app)
    parsed: dict[tuple[str, ...], set[str]] = {}
    for name in TODAY:
        lines = re.findall(r"^#   (longspan .*)$", _text(name), re.M)
        assert len(lines) > 5
        for line in lines:
            command: Any = root
            words = shlex.split(line)[1:]
            path: tuple[str, ...] = ()
            while hasattr(command, "commands"):
                path = (*path, words.pop(0))
                command = command.commands[path[-1]]
            options = {word for word in words if word.startswith("--")}
            if not options <= parsed.setdefault(path, set()):
                command.make_context(command.name, words)
                parsed[path] |= options
    assert len(parsed) > 5


@pytest.mark.parametrize("name", TODAY)
def test_what_a_recipe_reads_its_commands_make(name: str) -> None:
    """A store that no line makes is looked for by hand; a recipe that hides what was never run is believed."""
    text = _text(name)
    assert re.search(r"^# Run: ", text, re.M)
    made = set(re.findall(r"--out (\S+)", text))
    for path in _paths(yaml.safe_load(text)):
        assert any(path == out or path.startswith(f"{out}/") for out in made), path


def _text(name: str) -> str:
    return (FILES / f"{name}.yaml").read_text(encoding="utf-8")


def _paths(recipe: Any) -> set[str]:
    """Return what the streams and the validation of a recipe read."""
    found: set[str] = set(recipe["validation"]["stores"].values())
    for stage in recipe["stages"]:
        for stream in stage["streams"].values():
            for value in (stream.get("store"), stream.get("rows"), stream.get("records")):
                found.update([value] if isinstance(value, str) else value or ())
    return found


def test_the_page_names_every_recipe_and_every_data_set() -> None:
    """A recipe that the page leaves out is not found; a licence that it leaves out is not read."""
    page = DOCS.read_text(encoding="utf-8")
    for name in TODAY:
        assert f"`{name}`" in page
        for place in re.findall(r"hf://([\w.-]+/[\w.-]+)", _text(name)):
            assert place in page, place


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(
        ["some words"], tmp_path_factory.mktemp("t"), vocab_size=270, special_tokens=("<s>", "</s>", "<p>")
    )


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, promised.family) for name, promised in TODAY.items()),
        ("agent-sft-128k", "qwen3"),
        ("fu-2024-80k", "llama"),
    ],
)
def test_the_tiny_model_is_of_the_recipes_family(
    name: str, family: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """A Llama at tiny scale shows nothing about windows, sinks, experts and two RoPEs."""
    original = load_recipe(name).config
    known = known_model(original.model, tmp_path)
    model = tiny_model(known, tokenizer, seed=0)
    assert model.config.model_type == family
    assert model.num_parameters() < 500_000
    full, small = known.named, model.config
    for field in ("layer_types", "sliding_window", "num_local_experts", "rope_parameters"):
        assert bool(getattr(full, field, None)) <= bool(getattr(small, field, None)), field
    if full is not None and getattr(full, "layer_types", None):
        assert set(small.layer_types) == set(full.layer_types)
    # What the tiny recipe's RoPE counts from is what the tiny model has.
    for stage in scale_tiny(original).stages:
        if stage.rope is not None and not stage.rope_falls_short:
            check_reach(stage.rope, own_context=small.max_position_embeddings, context=stage.reach)


def test_every_published_family_has_a_tiny_model(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """A recipe of one's own for a model that is known by name ends in transformers' words at tiny scale."""
    families = {fields["model_type"]: fields for fields in published_configs().values()}
    # Of which the number of layers is written as a pattern.
    families.pop("nemotron_h")
    for family, fields in families.items():
        named = CONFIG_MAPPING[family].from_dict(dict(fields))
        made = tiny_model(KnownModel(None, None, None, None, None, named), tokenizer, seed=0)
        assert made.config.model_type == family
        assert made.num_parameters() < 5_000_000, family
    assert "stands for" not in caplog.text


def test_a_family_without_a_tiny_model_gets_a_llama_and_says_so(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Sizes that do not fit a family's own rules ended the command with transformers' message."""
    config = PretrainedConfig()
    config.model_type = "no_such_family"
    with caplog.at_level("WARNING", logger="longspan"):
        made = tiny_model(KnownModel(None, config, None, None, None), tokenizer, seed=0)
    assert made.config.model_type == "llama" and "a Llama stands for the no_such_family model" in caplog.text
