"""The certificate of layers with a state: packed and spread over ranks as each document alone on one device.

For each kind of layer a small model of a family that has it, beside full attention, is built on every rank. The ranks
compute a row of documents together, with every schedule and layout, and compare with transformers' own model, which
computes each document by itself:

    loss        of all tokens, relative
    gradients   of each parameter, summed over the ranks: relative 2-norm, the largest
    leak        one token of the first document changed: nothing of another document may change, to the bit
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.kernels.loss import IGNORE_LABEL
from longspan.models.hf import enable, hidden_states
from longspan.models.hf_config import head_counts
from longspan.models.init import seeded
from longspan.models.mixers import check_states
from longspan.parallel.certify import schedules_of
from longspan.parallel.schedules import CpSchedule, ScheduleName
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.parallel.shards import SequenceShards

__all__ = ["LAYER_KINDS", "LIMIT", "LayerResult", "certify_layers"]

LIMIT = 1e-5
"""Of loss and gradients, in fp32."""

BORDERS = (0, 19, 20, 53, 71)
"""A document longer than chunks of the recurrences, one of a single token, a length that no world divides."""
VOCABULARY = 48

_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_LATENT = {
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 8,
}

LAYER_KINDS: Mapping[str, Mapping[str, Any]] = {
    "gdn": {
        "model_type": "qwen3_next", **_SMALL, **_TWO_LAYERS, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 4, "linear_value_head_dim": 8, "mlp_only_layers": [0, 1], "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "kda": {
        "model_type": "kimi_linear", **_SMALL, **_TWO_LAYERS, **_LATENT, "linear_num_heads": 8, "linear_head_dim": 4,
        "mlp_layer_types": ["dense", "dense"],
    },
    "mamba2": {
        "model_type": "nemotron_h", **_SMALL, "layer_types": ["linear_attention", "full_attention", "mlp"],
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 16,
    },
    "mamba1": {
        "model_type": "jamba", **_SMALL, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "num_experts": 1, "num_experts_per_tok": 1, "mamba_dt_rank": 4, "mamba_d_state": 4,
    },
    "conv": {
        "model_type": "lfm2", **_SMALL, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"],
    },
    "lightning": {
        "model_type": "minimax", **_SMALL, **_TWO_LAYERS, "block_size": 8, "num_local_experts": 2,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip
"""By kind of layer, a small model of a family that has it."""


class LayerResult(NamedTuple):
    """What a kind of layer gave under one schedule and layout; errors are the same on all ranks."""

    layer: str
    world: int
    schedule: str
    degrees: str
    """Ring x Ulysses degree."""
    layout: str
    reason: str
    """Why it cannot be; empty if it ran."""
    loss_error: float
    gradient_error: float
    leaks: int
    """Numbers of other documents that moved."""

    @property
    def passed(self) -> bool | None:
        """Whether all is within its limit; None where it cannot be."""
        if self.reason:
            return None
        return self.loss_error <= LIMIT and self.gradient_error <= LIMIT and self.leaks == 0


def certify_layers(
    rank: int, kinds: Sequence[str], names: Sequence[ScheduleName], device_type: str = "cpu"
) -> list[LayerResult]:
    """Certify kinds of layers under the given schedules in the process group there is; all ranks call it.

    Returns:
        The results, the same on every rank.
    """
    device, world = torch.device(device_type), dist.get_world_size()
    schedules = [(name, *found) for name in names for found in schedules_of(name, world, device_type)]
    results = []
    for kind in kinds:
        model, truth = _build(kind, device)
        wanted = _alone(truth, device)
        enable(model)
        for name, degrees, schedule in schedules:
            for layout in schedule.layouts:
                try:
                    schedule.check_heads(*head_counts(model.config))
                    check_states(model, world)
                except ArgumentError as error:
                    reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
                    found = (reason, math.nan, math.nan, 0)
                else:
                    shards = SequenceShards(layout, BORDERS, world)
                    found = ("", *_errors(model, wanted, shards, schedule, device))
                results.append(LayerResult(kind, world, name, degrees, layout, *found))
    return results


def _build(kind: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model and its copy with transformers' own attention."""
    with seeded(0, "certify layers"):
        config = AutoConfig.for_model(**LAYER_KINDS[kind])
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases of 0 and norms of 1 would hide what is left out.
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model = model.to(device).eval()
    return model, copy.deepcopy(model)


def _ids() -> torch.Tensor:
    return torch.arange(BORDERS[-1]) * 7 % (VOCABULARY - 3) + 3


def _labels() -> torch.Tensor:
    """Return the next token of each, none at the end of a document."""
    ids = _ids()
    labels = torch.cat((ids[1:], ids[:1]))
    labels[torch.tensor(BORDERS[1:]) - 1] = IGNORE_LABEL
    return labels


def _loss(model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model.get_output_embeddings()(hidden)
    return cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction="sum")


class _Alone(NamedTuple):
    loss: float
    gradients: dict[str, torch.Tensor]


def _alone(model: PreTrainedModel, device: torch.device) -> _Alone:
    """Return loss and gradients of each document by itself."""
    total = torch.zeros((), device=device)
    sizes = [stop - start for start, stop in pairwise(BORDERS)]
    for ids, labels in zip(_ids().split(sizes), _labels().split(sizes)):
        total = total + _loss(model, hidden_states(model, ids.to(device)), labels.to(device))
    total.backward()
    return _Alone(float(total.detach()), dict(_gradients(model)))


def _gradients(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _errors(
    model: PreTrainedModel, wanted: _Alone, shards: SequenceShards, schedule: CpSchedule, device: torch.device
) -> tuple[float, float, int]:
    """Return the errors of loss and gradients, and how many numbers leaked."""
    documents = ShardedDocuments(shards, schedule)
    ids = documents.take(_ids(), padding=0).to(device)
    labels = documents.take(_labels(), padding=IGNORE_LABEL).to(device)
    model.zero_grad()
    hidden = hidden_states(model, ids, documents)
    loss = _loss(model, hidden, labels)
    loss.backward()
    total = loss.detach()
    dist.all_reduce(total)
    largest = max(float(gradient.norm()) for gradient in wanted.gradients.values())
    worst = 0.0
    for name, gradient in _gradients(model):
        dist.all_reduce(gradient)
        expected = wanted.gradients[name]
        error = float((gradient - expected).norm()) / (float(expected.norm()) + 1e-3 * largest)
        # What is not a number is infinitely wrong.
        worst = max(worst, math.inf if math.isnan(error) else error)
    changed = _ids()
    changed[BORDERS[1] // 2] = 2
    with torch.no_grad():
        again = hidden_states(model, documents.take(changed, padding=0).to(device), documents)
    others = torch.from_numpy(documents.indices >= BORDERS[1]).to(device)
    leaks = (again[others] != hidden[others]).sum()
    dist.all_reduce(leaks)
    return abs(float(total) - wanted.loss) / abs(wanted.loss), worst, int(leaks)
