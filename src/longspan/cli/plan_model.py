"""What `longspan plan MODEL` is about: a name, a folder, a config.json, or a recipe with more than a model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from longspan.core.errors import ArgumentError
    from longspan.plan.models import ModelShape
    from longspan.plan.training_step import Adapters

__all__ = ["Subject", "find_subject", "is_recipe"]

OTHER_SENSES = ("vision_config", "audio_config")
"""Parts of a config beside its language model."""


class Subject(NamedTuple):
    """A model, and what a recipe says of its training."""

    shape: ModelShape
    model: dict[str, Any]
    """`model` of a recipe that trains it."""
    lora: dict[str, Any] | None = None
    """`lora` of the recipe."""
    adapters: Adapters | None = None
    context: int | None = None
    """Of the recipe's longest stage."""
    batch_tokens: int | None = None
    notes: tuple[str, ...] = ()
    """What is to be known of it."""


def is_recipe(model: str) -> bool:
    """Whether MODEL names a recipe: a YAML file, or a shipped one by its name."""
    from longspan.plan.models import MODELS, published_configs

    if model.endswith((".yaml", ".yml")):
        return True
    # No shipped name has a slash; to look for it costs a third of a second.
    if "/" in model or model in MODELS or model in published_configs() or Path(model).exists():
        return False
    from longspan.train.recipes import shipped_recipes

    return model in shipped_recipes()


def find_subject(model: str) -> Subject:
    """Return what MODEL names.

    Raises:
        ArgumentError, ConfigError, DataError: nothing of that name, or a model without an estimate.
    """
    if is_recipe(model):
        return _of_recipe(model)
    path = Path(model)
    home = path.parent if path.suffix == ".json" else path
    shape, notes = _shape(model, {})
    return Subject(shape, {"path": str(home) if path.exists() else model}, notes=notes)


def _of_recipe(name: str) -> Subject:
    """Return the model of a recipe, its adapters, and length and batch of its longest stage; the rest is not read."""
    from longspan.core.errors import ConfigError
    from longspan.models.lora_config import LoraConfig
    from longspan.train.config import ModelConfig
    from longspan.train.fit import adapters
    from longspan.train.known_models import model_path
    from longspan.train.recipes import recipe_values

    recipe, stem, folder = recipe_values(name)
    if not isinstance(recipe.get("model"), dict):
        raise ConfigError(f"the recipe {name} names no model", allowed="model.path or model.hf_config")
    of_model = ModelConfig.from_dict(recipe["model"], where=f"model of {name}")
    written = dict(recipe["model"])
    notes: tuple[str, ...] = ()
    if of_model.path is None:
        from longspan.models.shape import shape_of_fields

        shape = shape_of_fields(of_model.hf_config or {}, stem)
    else:
        origin = str(model_path(of_model, folder / str(recipe.get("data_root") or ".")))
        written["path"] = origin
        shape, notes = _shape(origin, of_model.config_overrides)
    lora = recipe.get("lora")
    trained = None if lora is None else LoraConfig.from_dict(lora, where=f"lora of {name}")
    length, batch = _longest_stage(recipe.get("stages"))
    return Subject(shape, written, lora, adapters(trained), length, batch, notes)


def _longest_stage(stages: Any) -> tuple[int | None, int | None]:
    """Return length and batch of the longest stage, as far as they are said."""
    from longspan.core.units import parse_length, parse_tokens

    stages = stages if isinstance(stages, list) else []
    known = [
        (parse_length(str(stage["context_length"])), stage.get("batch_tokens"))
        for stage in stages
        if isinstance(stage, dict) and stage.get("context_length")
    ]
    length, batch = max(known, key=lambda each: each[0], default=(None, None))
    return length, None if batch is None else parse_tokens(str(batch))


def _shape(model: str, overrides: Mapping[str, Any]) -> tuple[ModelShape, tuple[str, ...]]:
    """Return the shape of a model by its name or place, with fields of its config replaced, and what is to be known."""
    from longspan.core.errors import ArgumentError, DataError
    from longspan.core.files import read_json
    from longspan.plan.models import MODELS, name_within, plain_name, published_configs

    path, name = Path(model), plain_name(model)
    notes: list[str] = []
    if path.exists():
        from longspan.models.places import adapter_base, adapter_folder

        file = path / "config.json" if path.is_dir() else path
        if not file.is_file() and adapter_folder(path) is not None:
            return _shape(adapter_base(path), overrides)
        if not file.is_file():
            raise ArgumentError(f"{path} holds no model", found="no config.json in it")
        name = path.name if path.is_dir() else path.parent.name or path.stem
        fields = read_json(file)
    else:
        known = name_within(model)
        fields = None if known == name else _of_hub(model)
        if fields is None:
            if known is None:
                raise _unknown(model)
            if known != name:
                notes.append(f"{model} is not at hand: taken for a {known} by its name")
            fields, name = published_configs().get(known), known
    if fields is None:
        if overrides:
            raise ArgumentError(
                "config_overrides change a config.json, which is not at hand",
                found=f"{model} with {', '.join(overrides)}",
                fix="name the model's folder, or leave them out where they are no sizes",
            )
        return MODELS[name], tuple(notes)
    if not isinstance(fields, dict):
        raise DataError(
            f"{path} holds no configuration", found=type(fields).__name__, allowed="a JSON object"
        )
    from longspan.models.shape import shape_of_fields

    if left_out := [part for part in OTHER_SENSES if fields.get(part)]:
        notes.append(f"{name}: its language model alone is planned, without {', '.join(left_out)}")
    return shape_of_fields(fields, name, overrides=overrides), tuple(notes)


def _of_hub(model: str) -> Any:
    """Return the fields of a config on the hub; None: it cannot be had."""
    from longspan.core.files import read_json
    from longspan.models.places import config_on_hub

    file = None if model.endswith(".json") else config_on_hub(model)
    return None if file is None else read_json(file)


def _unknown(model: str) -> ArgumentError:
    from longspan.core.errors import ArgumentError
    from longspan.plan.models import MODELS, plain_name, published_configs

    names = [*MODELS, *published_configs()]
    near = difflib.get_close_matches(plain_name(model), names, n=3, cutoff=0.6)
    return ArgumentError(
        "unknown model, which is not to be had from the hub either" if "/" in model else "unknown model",
        found=model,
        allowed=f"{', '.join(names)}; a folder with config.json; a config.json; a recipe",
        fix=f"did you mean {' or '.join(near)}?" if near else "name a folder with the model's config.json",
    )
