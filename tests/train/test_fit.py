"""A recipe's memory before it runs, and the settings that `memory: auto` stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longspan.core.errors import ArgumentError, ConfigError
from longspan.core.records import read_jsonl
from longspan.plan.models import MODELS
from longspan.plan.training import training_memory
from longspan.plan.training_step import LINEARS
from longspan.train.config import ModelConfig, TrainConfig
from longspan.train.fit import MemoryBudget, fit_memory, machine_budget, training_step
from longspan.train.known_models import known_model
from longspan.train.runtime import on_gpu
from longspan.train.trainer import train
from tests.train.conftest import recipe as small_recipe

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip

SHAPE = MODELS["llama-3-8b"]


def recipe(**fields: Any) -> TrainConfig:
    stage = {"context_length": 65536, "tokens": 65536 * 32, "lr": 1e-5, "streams": {"text": {"rows": "rows"}}}
    return TrainConfig.from_dict({
        "model": {"hf_config": LLAMA},
        "parallel": {"dp_shard": 2, "cp_ring": 4},
        "memory": {"compute_dtype": "bfloat16"},
        "stages": [
            {**stage, "name": "long", "batch_tokens": 65536 * 8, "micro_batch_tokens": 65536},
            {**stage, "name": "short", "context_length": 4096, "batch_tokens": 65536, "micro_batch_tokens": 4096},
        ],
        **fields,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("model", "memory", "expected"),
    [
        ({}, {}, "bfloat16"),
        ({"dtype": "float32"}, {}, "float32"),
        ({}, {"compute_dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, {}, "bfloat16"),
    ],
)
def test_adapters_on_a_gpu_stand_beside_bf16_unless_told(
    model: dict[str, Any], memory: dict[str, Any], expected: str
) -> None:
    """LoRA with the default type computed in fp32 on a GPU, and so without a flash kernel."""
    config = recipe(model={"path": "base", **model}, memory=memory, lora={"rank": 4})
    assert on_gpu(config).model.dtype == expected
    assert on_gpu(on_gpu(config)) == on_gpu(config)


def test_a_step_is_that_of_the_recipe() -> None:
    """A micro-batch counted for all processes, or a schedule that the degrees do not mean."""
    config = recipe()
    step = training_step(config, config.stages[0], cuda=True)
    found = (step.tokens, step.parallel.schedule_name, step.parallel.shards, step.accumulates)
    assert found == (65536, "ring", 8, True)
    assert training_step(config, config.stages[1], cuda=True).tokens == 4096
    alone = recipe(parallel={"dp_shard": 8})
    assert not training_step(alone, alone.stages[0], cuda=True).accumulates


@pytest.mark.parametrize(
    ("names", "adapted"),
    [
        ("all-linear", LINEARS),
        (["q_proj", "v_proj"], ("q", "v")),
        (["mlp.up_proj", "o_proj"], ("o", "up")),
        (["query_key_value"], LINEARS),
    ],
)
def test_adapters_are_those_of_the_recipe(names: Any, adapted: tuple[str, ...]) -> None:
    """Adapters of two layers counted as if all seven had one: half as much memory again as it takes."""
    model = {"path": "base", "dtype": "bfloat16"}
    config = recipe(model=model, lora={"rank": 16, "target_modules": names})
    step = training_step(config, config.stages[1], cuda=True)
    assert step.lora is not None and step.lora.targets == adapted
    every = step._replace(lora=step.lora._replace(targets=LINEARS))
    shape = SHAPE
    ratio = training_memory(shape, every).device / training_memory(shape, step).device
    assert ratio > 1.1 if adapted != LINEARS else ratio == 1


def test_the_longest_stage_decides() -> None:
    """What fits the short stage alone would end in the long one, days later."""
    config = recipe()
    memory, choice = fit_memory(config, SHAPE, MemoryBudget(60e9, 200e9, True))
    assert memory.compute_dtype == "bfloat16" and memory.activation_checkpointing != "none"
    chosen = config.model_copy(update={"memory": memory})
    for stage in config.stages:
        step = training_step(chosen, stage, cuda=True)
        assert training_memory(SHAPE, step).device <= 60e9
    assert choice.reasons()[0].startswith("memory: activation_checkpointing")


def test_nothing_is_sent_away_from_a_cpu() -> None:
    """Host to host is a copy for nothing."""
    memory, _ = fit_memory(recipe(), SHAPE, MemoryBudget(60e9, 0.0, False))
    assert memory.activation_checkpointing != "offload" and not memory.offload_parameters
    found = machine_budget()
    assert found.device > 1e8 and (found.cuda or found.host == 0)


def test_what_does_not_fit_is_said_before_it_runs() -> None:
    """An out-of-memory error after an hour of loading."""
    with pytest.raises(ArgumentError, match="does not fit"):
        fit_memory(recipe(), SHAPE, MemoryBudget(5e9, 1e9, True))


def test_auto_is_a_word_and_chooses_alone() -> None:
    """`memory: auto` beside a setting that it would overrule without a word."""
    assert recipe(memory="auto").memory.auto
    assert recipe(memory={"auto": True, "compute_dtype": "bfloat16"}).memory.compute_dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"memory\.auto chooses tiled_mlp"):
        recipe(memory={"auto": True, "tiled_mlp": 1024})


def test_a_single_gpu_walks_in_chunks_where_nothing_else_fits() -> None:
    """A choice that names a field of the recipe by another name, and is lost on the way."""
    long = {
        "context_length": 524288,
        "tokens": 524288 * 4,
        "batch_tokens": 524288,
        "micro_batch_tokens": None,
    }
    config = recipe(parallel={}, stages=[{**recipe().stages[0].to_dict(), **long}])
    roomy, tight = (fit_memory(config, SHAPE, MemoryBudget(size, 1e12, True))[0] for size in (400e9, 40e9))
    assert roomy.chunk_tokens is None and not roomy.offload_chunk_cache
    assert tight.chunk_tokens is not None and tight.offload_chunk_cache and tight.offload_parameters


def test_auto_trains_with_the_same_losses(data_root: Path, tmp_path: Path) -> None:
    """A choice that is made and not used, or that changes what is computed."""
    losses: list[list[float]] = []
    settings: tuple[Any, ...] = ({}, "auto")
    for memory in settings:
        out = tmp_path / str(len(losses))
        train(TrainConfig.from_dict(small_recipe(memory=memory)), out, data_root=data_root)
        losses.append([record["loss"] for record in read_jsonl(out / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_overrides_of_a_model_that_is_not_at_hand_count() -> None:
    """An estimate of the model as it was published, where a recipe trains it with fewer layers."""
    changed = {"num_hidden_layers": 2}
    small = known_model(ModelConfig(path="owner/smollm2-135m", config_overrides=changed), Path())
    assert small.shape is not None and small.shape.layers == 2
    for overrides, has_shape in ((changed, False), ({}, True)):
        known = known_model(ModelConfig(path="owner/llama-3-8b", config_overrides=overrides), Path())
        assert (known.shape is not None) == has_shape
