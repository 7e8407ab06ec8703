"""Routers' losses over a whole step against transformers' own function, and the load of experts against a count."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from longspan.core.errors import ConfigError
from longspan.core.records import read_jsonl
from longspan.data.rows.loader import PAD_SOURCE, PackedRow
from longspan.kernels.experts import experts_in
from longspan.kernels.tiled_mlp import enable_tiled_mlp
from longspan.models.checkpointing import enable_checkpointing
from longspan.models.hf import build_model, save_model
from longspan.models.routing import aux_loss_weight, watch_routing
from longspan.parallel.launch import spawn_local
from longspan.train.batch import collate, total_weight
from longspan.train.config import TrainConfig
from longspan.train.objectives import ModelWithLoss
from longspan.train.run_plan import plan_run
from longspan.train.trainer import train, train_step
from tests.models.family_columns import small_model
from tests.patience import PATIENCE_SECONDS
from tests.train.conftest import recipe

EXPERTS = 4
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, "sliding_window": 6},
    # Chosen by sigmoids with a bias.
    "deepseek_v3": {
        "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "q_lora_rank": 8,
        "first_k_dense_replace": 1, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip
AUX, Z = 0.3, 0.02


def fields(family: str) -> dict[str, Any]:
    return {
        "model_type": family, "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
        **FAMILIES[family],
    }  # fmt: skip


def model_of(family: str) -> Any:
    model = build_model(fields(family), seed=3).train()
    for name, weight in model.named_parameters():
        if "router" in name or "gate.weight" in name:
            # Far from balance, or the loss has next to no gradient.
            torch.nn.init.normal_(weight, std=1.0, generator=torch.Generator().manual_seed(5))
    return model


def rows_of(*lengths: tuple[int, ...]) -> list[PackedRow]:
    """Rows of documents of so many tokens, the last of which is padding."""
    made = []
    for number, documents in enumerate(lengths):
        ids = np.random.default_rng(number).integers(1, 48, sum(documents))
        weights = np.ones(len(ids), np.uint8)
        weights[-documents[-1] :] = 0
        ids[-documents[-1] :] = 0
        sources = np.array([0] * (len(documents) - 1) + [1], np.uint16)
        made.append(
            PackedRow(
                ids, np.cumsum([0, *documents]).astype(np.int32), np.arange(len(documents), dtype=np.uint32),
                sources, ("text", PAD_SOURCE), np.zeros(len(documents), bool), weights,
            )
        )  # fmt: skip
    return made


ROWS = rows_of((20, 9, 7), (30, 6), (11, 10, 15), (5, 28, 3))


def grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def by_transformers(model: Any) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Return both losses and the gradients of all rows as one batch, with transformers' functions of its logits."""
    batch = collate(ROWS)
    real = batch.sources == 0
    recorded = model.model(
        batch.input_ids[None], position_ids=batch.positions[None], documents=batch.documents,
        output_router_logits=True, use_cache=False,
    ).router_logits  # fmt: skip
    aux = load_balancing_loss_func(recorded, EXPERTS, 2, attention_mask=real[None].long())
    z = router_z_loss_func(torch.cat([logits[real] for logits in recorded])[None])
    loss = ModelWithLoss(model)(batch).loss / total_weight(ROWS) + AUX * aux + Z * z
    loss.backward()
    return aux.item(), z.item(), grads(model)


@pytest.mark.parametrize(
    ("family", "rows", "chunk", "memory"),
    [
        ("mixtral", 4, None, "plain"),
        ("mixtral", 1, None, "plain"),
        ("mixtral", 3, None, "full"),
        ("mixtral", 2, 16, "plain"),
        ("gpt_oss", 4, None, "full"),
        ("deepseek_v3", 2, None, "plain"),
    ],
)
def test_losses_are_those_of_one_batch_of_all_tokens(
    family: str, rows: int, chunk: int | None, memory: str
) -> None:
    """A mean of the losses of micro-batches, padding that counts, a forward pass computed again that counts twice."""
    model = model_of(family)
    aux, z, expected = by_transformers(copy.deepcopy(model))
    if memory == "full":
        enable_checkpointing(enable_tiled_mlp(model, 10), "full")
    trained = ModelWithLoss(model)
    trained.routing = watch_routing(model, aux_loss=AUX, z_loss=Z)
    result = train_step(
        trained, [], ROWS, rows_per_micro_batch=rows, max_grad_norm=math.inf, chunk_tokens=chunk
    )
    assert result.routing is not None
    assert result.routing.aux_loss == pytest.approx(aux, rel=1e-5)
    assert result.routing.z_loss == pytest.approx(z, rel=1e-5)
    found = grads(model)
    assert found.keys() == expected.keys()
    largest = max(float(each.norm()) for each in expected.values())
    for name, each in expected.items():
        error = float((found[name] - each).norm())
        assert error <= 1e-4 * (float(each.norm()) + 1e-3 * largest), (name, error)


def test_loads_are_those_of_the_tokens_that_are_no_padding() -> None:
    """Padding goes to one expert and would pass for imbalance; so would tokens that are computed twice."""
    model = enable_checkpointing(model_of("mixtral"), "full")
    seen: list[torch.Tensor] = []
    first = next(iter(experts_in(model).values()))
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    batch = collate(ROWS)
    with torch.no_grad():
        ModelWithLoss(model)(batch)
    hook.remove()
    counts = torch.bincount(seen[0][batch.sources == 0].flatten(), minlength=EXPERTS).double()
    trained = ModelWithLoss(model)
    trained.routing = watch_routing(model, aux_loss=None, z_loss=0)
    routing = train_step(trained, [], ROWS, rows_per_micro_batch=3, max_grad_norm=1.0).routing
    assert routing is not None and routing.aux_loss is None and len(routing.max_load) == 3
    assert routing.max_load[0] == pytest.approx(float(counts.max() / counts.mean()))
    shares = counts / counts.sum()
    assert routing.entropy[0] == pytest.approx(float(-(shares * shares.log()).sum() / math.log(EXPERTS)))
    # Validation between steps counts nothing.
    ModelWithLoss(model)(batch)
    again = train_step(trained, [], ROWS, rows_per_micro_batch=3, max_grad_norm=1.0).routing
    assert again == routing


def test_a_model_is_trained_with_its_own_loss_where_its_config_asks_and_refused_where_it_has_none() -> None:
    """transformers trains with the loss if output_router_logits is set; a dense model would be asked in vain."""
    assert aux_loss_weight(build_model({**fields("mixtral"), "router_aux_loss_coef": 0.7}, seed=0)) == 0
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
    assert aux_loss_weight(build_model({**fields("mixtral"), **asked}, seed=0)) == 0.7
    config = TrainConfig.from_dict(recipe(router={"aux_loss": 0.01}))
    with pytest.raises(ConfigError, match="no routers"):
        plan_run(config, data_root=Path("/nowhere"))


def small_run(**changes: Any) -> dict[str, Any]:
    stage = {
        "name": "only", "context_length": 45, "steps": 3, "batch_tokens": 45 * 4, "micro_batch_tokens": 45 * 2,
        "lr": 0.004, "max_epochs": 50,
        "streams": {"text": {"store": "plain"}, "weighted": {"store": "weighted", "pack": {"strategy": "intact"}}},
    }  # fmt: skip
    model = {"hf_config": {**fields("mixtral"), "vocab_size": recipe()["model"]["hf_config"]["vocab_size"]}}
    values = recipe(stages=[stage], model=model, optimizer={"name": "adamw", "eps": 1e-5})
    return {**values, "router": {"aux_loss": 0.5, "z_loss": 0.1}, **changes}


def train_all(rank: int, runs: list[tuple[dict[str, Any], str]], data_root: str) -> None:
    for values, out in runs:
        train(TrainConfig.from_dict(values), out, data_root=data_root)


@pytest.mark.slow
def test_every_way_to_share_the_work_follows_one_process(data_root: Path, tmp_path: Path) -> None:
    """Losses of each rank's own tokens, experts that one rank alone gathers, padding of the layout that counts."""
    memory = {"tiled_mlp": 16, "activation_checkpointing": "full"}
    base = tmp_path / "base"
    save_model(build_model(small_run()["model"]["hf_config"], seed=0), base)
    adapters = {
        "model": {"path": str(base)},
        "lora": {"rank": 2, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    }
    ways: dict[str, dict[str, dict[str, Any]]] = {
        "whole": {
            "dp": {"parallel": {"dp_shard": 2}, "memory": memory},
            "ring": {"parallel": {"cp_ring": 2}},
            "ulysses": {"parallel": {"cp_ulysses": 2}, "memory": memory},
        },
        "adapters": {"adapted dp": {"parallel": {"dp_shard": 2}, "memory": memory}},
    }
    changes = {"whole": {}, "adapters": adapters}
    runs = []
    for kind, names in ways.items():
        train(TrainConfig.from_dict(small_run(**changes[kind])), tmp_path / kind, data_root=data_root)
        runs += [(small_run(**changes[kind], **each), str(tmp_path / name)) for name, each in names.items()]
    spawn_local(train_all, 2, runs, str(data_root), timeout_seconds=PATIENCE_SECONDS)
    for kind, names in ways.items():
        expected = list(read_jsonl(tmp_path / kind / "metrics.jsonl"))
        assert all(record["experts"]["dropped"] == 0 for record in expected)
        for name in names:
            for one, many in zip(expected, read_jsonl(tmp_path / name / "metrics.jsonl"), strict=True):
                for key in ("loss", "grad_norm", "router_aux_loss", "router_z_loss"):
                    assert many[key] == pytest.approx(one[key], rel=1e-4), (name, key)
                assert many["experts"]["max_load_by_layer"] == one["experts"]["max_load_by_layer"]


@pytest.mark.parametrize(("family", "layers"), [("zamba", 0), ("jamba", 1)])
def test_layers_with_a_state_are_no_experts(family: str, layers: int) -> None:
    """Mamba-1 keeps a tensor of three dimensions, too, and is called with two arguments more: Zamba's first step
    ended with an error."""
    model = small_model(family).train()
    routing = watch_routing(model, aux_loss=None, z_loss=0.0)
    assert len(experts_in(model)) == layers and (routing is not None) == (layers > 0)
    trained = ModelWithLoss(model)
    trained.routing = routing
    result = train_step(trained, [], rows_of((9, 4, 3)), rows_per_micro_batch=1, max_grad_norm=1.0)
    assert result.loss is not None and math.isfinite(result.loss)
