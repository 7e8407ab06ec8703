"""The experts of a mixture as transformers lays them out: one module a layer, whose weights are [experts, ...] tensors.

Its forward pass takes tokens [T, hidden] with the choices of the router, experts [T, chosen] and shares [T, chosen],
and returns what the chosen experts make of each token. Adapters stand around such a module (peft's ParamWrapper) and
are called in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["are_experts", "experts_in", "innermost", "num_experts", "takes_choices"]

CHOICES = 2
"""Arguments beside the tokens: which experts, and what share each has."""


def experts_in(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the experts below a module by name, the adapters around them included."""
    found: dict[str, torch.nn.Module] = {}
    for name, each in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and takes_choices(each):
            found[name] = each
    return found


def are_experts(module: torch.nn.Module) -> bool:
    """Whether a module is all experts of a layer, whatever it is called with."""
    # Among its classes, one of the family: what makes tiles or shards of it puts its own in front.
    named = any(kind.__name__.endswith("Experts") for kind in type(module).__mro__)
    return named and any(weight.ndim == 3 for weight in module.parameters(recurse=False))


def takes_choices(module: torch.nn.Module) -> bool:
    """Whether a module is the experts of a layer, and is called with each token's choices."""
    inner = innermost(module)
    if not are_experts(inner):
        return False
    # The family's own, whatever stands in front of it (tiles, FSDP).
    forwards = (kind.__dict__["forward"] for kind in type(inner).__mro__ if "forward" in kind.__dict__)
    return any(len(_arguments(forward)) == 1 + CHOICES for forward in forwards)


def _arguments(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    arguments = list(inspect.signature(forward).parameters.values())[1:]
    return [each for each in arguments if each.kind is each.POSITIONAL_OR_KEYWORD]


def innermost(module: torch.nn.Module) -> torch.nn.Module:
    """Return the experts inside adapters around them; others as they are."""
    while isinstance(inner := getattr(module, "base_layer", None), torch.nn.Module):
        module = inner
    return module


def num_experts(module: torch.nn.Module) -> int:
    """Return how many experts a router can choose from, those without weights (zero experts) included."""
    inner = innermost(module)
    return max(weight.shape[0] for weight in inner.parameters(recurse=False) if weight.ndim == 3)
