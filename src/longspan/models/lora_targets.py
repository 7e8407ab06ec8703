"""What the settings of an adapter mean in a model: its linear layers, tensors of experts, layers trained whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from longspan.core.errors import ConfigError
from longspan.kernels.experts import are_experts
from longspan.models.lora_config import LoraConfig
from longspan.models.quantize import is_called, linears, passed_by

__all__ = ["TargetLayers", "expert_tensors", "is_tied", "target_layers", "without_numbers"]


class TargetLayers(NamedTuple):
    """Full names of what a config means in a model: layers, and tensors of experts."""

    targets: list[str]
    trainable: list[str]
    parameters: list[str]
    """Tensors of experts."""


def target_layers(model: nn.Module, config: LoraConfig) -> TargetLayers:
    """Return what a config means in a model. Raises ConfigError for a name that matches nothing."""
    found_linears = linears(model)
    if not found_linears and not config.target_parameters:
        raise ConfigError(
            f"{type(model).__name__} has no linear layers that an adapter could stand beside",
            fix="train its weights whole: leave lora out",
        )
    names = sorted({name.rpartition(".")[2] for name in found_linears})
    passed = passed_by(model, found_linears)
    if config.target_modules == "all-linear":
        targets = [
            name
            for name in found_linears
            if name not in passed and not any(is_called(word, name) for word in config.trainable)
        ]
    else:
        targets = []
        for word in config.target_modules:
            found = [name for name in found_linears if is_called(word, name)]
            if not found:
                raise ConfigError(
                    f"lora.target_modules: no linear layer is called {word!r}",
                    allowed="all-linear, or of " + ", ".join(names),
                    fix="what is not a linear layer, such as an embedding, can be named in lora.trainable",
                )
            if both := [name for name in found if name in passed]:
                raise ConfigError(
                    "an adapter does nothing where the weight of its layer is read past it, as state-space layers do",
                    found=f"{both[0]} by {word!r} in lora.target_modules",
                    fix="leave it out, or name it in lora.trainable",
                )
            targets += [name for name in found if name not in targets]
    return TargetLayers(targets, _trainable(model, config, targets), _parameters(model, config))


def _parameters(model: nn.Module, config: LoraConfig) -> list[str]:
    tensors = expert_tensors(model)
    chosen: list[str] = []
    for word in config.target_parameters:
        found = [name for name in tensors if is_called(word, name)]
        if not found:
            raise ConfigError(
                f"lora.target_parameters: no tensor of experts is called {word!r}",
                found=f"a {type(model).__name__}",
                allowed=sorted({".".join(name.split(".")[-2:]) for name in tensors})
                or "none: it has no experts",
            )
        chosen += [name for name in found if name not in chosen]
    return chosen


def _trainable(model: nn.Module, config: LoraConfig, targets: list[str]) -> list[str]:
    with_parameters = {
        name: module
        for name, module in model.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None
    }
    chosen: list[str] = []
    for word in config.trainable:
        found = [name for name in with_parameters if is_called(word, name)]
        if not found:
            names = sorted({name.rpartition(".")[2] for name in with_parameters})
            raise ConfigError(f"lora.trainable: no layer is called {word!r}", allowed=names)
        if both := sorted(set(found) & set(targets)):
            raise ConfigError(
                "a layer gets an adapter or is trained whole, not both",
                found=f"{both[0]} in lora.target_modules and in lora.trainable",
            )
        chosen += [name for name in found if name not in chosen]
    if not isinstance(model, PreTrainedModel) or not is_tied(model, chosen):
        return chosen
    # A tied head is trained through the embedding that it shares.
    modules = dict(model.named_modules(remove_duplicate=False))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    chosen = [name for name in chosen if modules[name] is not head and modules[name] is not embedding]
    return [next(name for name, module in modules.items() if module is embedding), *chosen]


def is_tied(model: nn.Module, trainable: list[str]) -> bool:
    """Return whether one of these layers shares its weight between the two embeddings."""
    if not isinstance(model, PreTrainedModel) or not model.config.tie_word_embeddings:
        return False
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    modules = dict(model.named_modules(remove_duplicate=False))
    return any(modules[name] is embedding for name in trainable for embedding in both)


def expert_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors of a model that hold a matrix of each expert."""
    return {
        f"{place}.{name}": weight
        for place, module in model.named_modules()
        if are_experts(module)
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3
    }


def without_numbers(names: Iterable[str]) -> list[str]:
    return sorted({".".join(part for part in name.split(".") if not part.isdigit()) for name in names})
