"""Configurations and figures that somebody twisted: an estimate of the model that is really built, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from longspan.core.errors import UserError
from longspan.core.mesh_config import MeshConfig
from longspan.models.shape import shape_of_fields
from longspan.plan.hardware import GPUS, Gpu, parse_gpus
from longspan.plan.models import MODELS
from longspan.plan.search import search
from tests.plan.test_models import EXPERTS, SMALL, counted

LLAMA: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
MIXTURE: dict[str, Any] = {**EXPERTS, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
WINDOWS: dict[str, Any] = {
    **LLAMA, "model_type": "gemma3_text", "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
VALUES = st.sampled_from([0, -1, 1, 2, 3, 7, 64, None, "many", 1.5, [], {}, True, 1 << 40])
TWISTS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@TWISTS
@given(st.sampled_from([LLAMA, MIXTURE, WINDOWS]), st.data())
def test_a_twisted_config_is_counted_as_it_is_built_or_refused(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    """A crash in transformers that reaches the user, or a guess where a size is none."""
    twisted = dict(fields)
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=2, unique=True)):
        if data.draw(st.booleans()):
            twisted[name] = data.draw(VALUES)
        else:
            del twisted[name]
    try:
        shape = shape_of_fields(twisted, "twisted")
    except UserError:
        return
    assert shape.parameters == counted(CONFIG_MAPPING[twisted["model_type"]].from_dict(dict(twisted)))
    assert shape.layers > 0 and 0 < shape.active_parameters <= shape.parameters


@pytest.mark.parametrize(
    "strange",
    [
        {"n_routed_experts": 64}, {"sliding_window": 128}, {"kv_lora_rank": 64}, {"mamba_d_state": 16},
        {"moe_intermediate_size": 32}, {"block_sparse_heads": [1, 2]},
    ],
)  # fmt: skip
def test_sizes_that_the_family_has_not_are_refused(strange: dict[str, Any]) -> None:
    """A mixture of experts under the name of a dense family, which transformers builds without its experts."""
    with pytest.raises(UserError, match="sizes that llama has not"):
        shape_of_fields({**LLAMA, **strange}, "strange")
    nothing = dict.fromkeys(strange, None) | {"n_shared_experts": 0, "num_experts": 1, "_name_or_path": "moe"}
    assert shape_of_fields({**LLAMA, **nothing}, "strange") == shape_of_fields(LLAMA, "strange")


FIGURES = st.dictionaries(
    st.sampled_from(["like", "flops", "memory", "bandwidth", "nvlink", "network", "host_link", "host_memory",
                     "per_node", "family", "measured", "name", "speed"]),
    st.sampled_from(["h100", "cpu", "ada", 0, -1, 1, 2.5, 1e12, "1e12", "nan", None, [], True]),
    max_size=8,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(FIGURES)
@example({"like": []})
def test_figures_of_ones_own_are_a_gpu_or_refused(figures: dict[str, Any]) -> None:
    """Half a GPU, one with a speed that is no number, or one of a kind whose kernels nobody knows."""
    text = (
        "{"
        + ", ".join(f"{key}: {'null' if value is None else value}" for key, value in figures.items())
        + "}"
    )
    try:
        gpu = parse_gpus(f"2x{text}").gpu
    except UserError:
        return
    numbers = gpu._asdict()
    del numbers["name"], numbers["family"], numbers["measured"]
    assert all(isinstance(number, (int, float)) and 0 < number < float("inf") for number in numbers.values())
    assert gpu.per_node >= 1 and not figures.keys() & {"measured", "name", "speed"}


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["llama-3-8b", "qwen3-0.6b", "danube2-1.8b"]), st.integers(1, 5), st.integers(1, 8),
    st.sampled_from(sorted(GPUS)), st.integers(10, 20),
)  # fmt: skip
def test_nodes_of_any_size_are_planned(model: str, nodes: int, per_node: int, name: str, power: int) -> None:
    """Three nodes of five GPUs that end in a division by zero, or a faster network that makes a step slower."""
    num, gpu = parse_gpus(f"{nodes}x{per_node}x{name}")
    assert (num, gpu.per_node) == (nodes * per_node, per_node)

    def best(machine: Gpu) -> float:
        found = search(MODELS[model], machine, context=2**power, num_gpus=num, batch_tokens=2**power)
        assert found and all(each.seconds > 0 for each in found)
        assert all(isinstance(each.candidate.step.parallel, MeshConfig) for each in found)
        assert all(each.candidate.step.parallel.world == num for each in found)
        return min(each.seconds / each.tokens for each in found)

    assert best(gpu._replace(network=gpu.network * 4, nvlink=gpu.nvlink * 4)) <= best(gpu) * (1 + 1e-9)
