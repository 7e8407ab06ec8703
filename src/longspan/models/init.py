"""Initial weights that depend on the seed and on nothing else.

`default` is the model's own initialisation. `zero_residual` is a scheme for small models trained with Muon:

    embedding                           N(0, 0.7)
    attention output, MLP down          0            every layer starts as the identity
    other matrices                      N(0, 1/sqrt(fan_in))
    final norm                          0.3 / (sqrt(hidden) * std of the output embedding)
    biases                              0
    other norms                         as the model made them

The final norm makes the first logits N(0, 0.3), close to uniform, so training starts near log(vocabulary)
although a tied embedding is as large as 0.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from longspan.core.errors import ConfigError
from longspan.core.seeds import derive_seed
from longspan.models.head import backbone

__all__ = ["INITS", "seeded", "zero_residual"]

EMBEDDING_STD = 0.7
FIRST_LOGIT_STD = 0.3

# Names of the last matrix of an attention or MLP block, over the model families of transformers.
RESIDUAL_OUTPUTS = {
    "o_proj",
    "out_proj",
    "down_proj",
    "c_proj",
    "dense",
    "dense_4h_to_h",
    "fc2",
    "fc_out",
    "wo",
}
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Seed torch's CPU generator for the block and put its state back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *purpose))
        yield


def zero_residual(model: PreTrainedModel, *, seed: int) -> None:
    """Fill a freshly built model with the weights described above.

    Every matrix has a random stream of its own, named after it, so adding a layer changes no other layer.

    Raises:
        ConfigError: a model whose block outputs or final norm have none of the known names.
    """
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings().weight
    found_outputs = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            owner = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
            if parts[-1] == "bias":
                parameter.zero_()
            elif parameter.ndim < 2:
                continue
            elif owner in RESIDUAL_OUTPUTS:
                parameter.zero_()
                found_outputs += 1
            else:
                std = EMBEDDING_STD if parameter is embedding else _fan_in(model, name, parameter) ** -0.5
                generator = torch.Generator().manual_seed(derive_seed(seed, "zero_residual", name))
                values = torch.randn(parameter.shape, generator=generator) * std
                parameter.copy_(values)
        hidden_size = output.shape[1]
        output_std = EMBEDDING_STD if output is embedding else hidden_size**-0.5
        _set_scale(_final_norm(model), FIRST_LOGIT_STD / (math.sqrt(hidden_size) * output_std))
    if not found_outputs:
        raise ConfigError(
            f"{type(model).__name__} has no block outputs by a known name", allowed=sorted(RESIDUAL_OUTPUTS)
        )


INITS: dict[str, Callable[..., None] | None] = {"default": None, "zero_residual": zero_residual}
"""Initialisations by name; None keeps what the model made itself."""


def _fan_in(model: PreTrainedModel, name: str, parameter: torch.Tensor) -> int:
    owner = model.get_submodule(name.rpartition(".")[0])
    return parameter.shape[0] if isinstance(owner, Conv1D) else parameter.shape[-1]


def _final_norm(model: PreTrainedModel) -> torch.Tensor:
    for name in FINAL_NORMS:
        if (norm := getattr(backbone(model), name, None)) is not None:
            return norm.weight
    raise ConfigError(f"{type(model).__name__} has no final norm by a known name", allowed=FINAL_NORMS)


def _set_scale(weight: torch.Tensor, scale: float) -> None:
    # Some families store the scale minus one, and so start at 0 instead of 1.
    stored_minus_one = not weight.any()
    weight.fill_(scale - 1.0 if stored_minus_one else scale)
