"""Time and memory of a step: the terms by hand, what cannot be, and published rows."""

from __future__ import annotations

import pytest
from benchmarks.offloaded_step import WORKSPACE, best_steps, simulate, step_memory

from longspan.core.mesh_config import MeshConfig
from longspan.plan.efficiency import shares_of
from longspan.plan.hardware import GPUS
from longspan.plan.memory import attention_buffers
from longspan.plan.models import MODELS
from longspan.plan.scale import (
    HALF_ROWS,
    arrangement_name,
    arrangements,
    attention_seconds,
)

M = 2**20
LLAMA, H100 = MODELS["llama-3-8b"], GPUS["h100"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.55),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
    ],
)
def test_parameters_are_those_of_the_model(name, billions):
    """A wrong width in the table would move every figure of that model; sizes are those of the model cards."""
    assert round(MODELS[name].parameters / 1e9, 2) == billions


def test_flops_of_one_device_by_hand():
    """FLOPs per token are 2 per weight, and attention is half of 4 * tokens^2 * width a layer."""
    tokens = 2**17
    step = simulate(LLAMA, H100, MeshConfig(), context=tokens, num_gpus=1, sequences=1)
    rate = H100.flops * tokens / (tokens + HALF_ROWS)
    shares = shares_of("hopper")
    attention = 2 * tokens**2 * 4096 * 32
    layers = 2 * tokens * LLAMA.layer_active * 32
    head = 2 * tokens * LLAMA.vocab * 4096
    # Recomputed forward and backward: matrices 1 + 1 + 2, attention 1 + 1 + 2.5.
    by_hand = (
        4 * (layers + head) / shares.linear
        + 2 * attention / shares.forward
        + 2.5 * attention / shares.backward
    )
    by_hand /= rate
    update = LLAMA.parameters * 4 / (H100.host_link * 0.8)
    assert step.seconds == pytest.approx(by_hand + update)
    assert step.mfu == pytest.approx(3 * (layers + head + attention) / step.seconds / H100.flops)


def test_a_ring_waits_for_its_slowest_part():
    """Hidden while blocks are long; waited for when a block takes less time than the next one's way."""
    degrees = MeshConfig(cp_ring=64)
    long, free = attention_seconds(LLAMA, H100, degrees, context=8 * M, backward=False)
    assert long == pytest.approx(free)
    short, free = attention_seconds(LLAMA, H100, degrees, context=M // 8, backward=False)
    block = 2 * (M // 8 // 64) * 8 * 128 * 2
    assert short - free == pytest.approx(63 * (block / (50e9 * 0.8) + 20e-6 - free / 64))


def test_an_even_world_costs_dist_flash_one_half_block():
    """In the last step of an even world only half the ranks have a block: 9 halves in place of 8 on 8 ranks."""
    even, _ = attention_seconds(
        LLAMA, H100, MeshConfig.of_schedule("dist_flash", 8), context=8 * M, backward=False
    )
    ideal, _ = attention_seconds(LLAMA, H100, MeshConfig(), context=8 * M, backward=False)
    assert even / (ideal / 8) == pytest.approx(9 / 8, rel=0.01)


def test_trades_between_nodes_are_slower_than_inside():
    """Ulysses over more than one node pays for the network, not for NVLink."""
    waits = []
    for degree in (8, 16):
        found, free = attention_seconds(
            LLAMA, H100, MeshConfig(cp_ulysses=degree), context=degree * 16384, backward=False
        )
        waits.append(found - free)
    assert waits[1] > 3 * waits[0]


def test_impossible_steps_say_what_is_missing():
    """A table that ranks what does not fit."""
    steps = best_steps(LLAMA, H100, context=16 * M, num_gpus=8, batch_tokens=4 * M)
    assert {step.limit for step in steps.values()} == {"device memory"}
    small = H100._replace(host_memory=1e11)
    assert (
        simulate(LLAMA, small, MeshConfig(cp_ring=8), context=M, num_gpus=8, sequences=1).limit
        == "host memory"
    )


def test_arrangements_divide_heads_and_ranks():
    """Ulysses on 64 ranks of a model with 32 heads is no arrangement."""
    names = [arrangement_name(each) for each in arrangements(LLAMA, H100, 64)]
    assert names == ["ring 64", "dist_flash 64", "all_gather 64", "usp 2x32", "usp 4x16", "usp 8x8"]
    assert [arrangement_name(each) for each in arrangements(LLAMA, H100, 1)] == ["none"]
    assert "ulysses 32" in [arrangement_name(each) for each in arrangements(LLAMA, H100, 32)]


def test_memory_of_the_parts():
    """All-gather holds heads of the whole sequence, Ulysses its own and the copies, FSDP shards the rest."""
    tokens, ranks = 1024, 8
    one_head = 2 * tokens * ranks * 128
    assert attention_buffers("all_gather", LLAMA, tokens, kernel=80.0, ring_degree=ranks) == pytest.approx(
        one_head * 14 + 5 * tokens * 4096 / 8 * 2 + 80 / 8
    )
    # 16 ranks hold two copies of every key head, with gradients, and trade them too.
    two, one = (
        attention_buffers("ulysses", LLAMA, tokens, kernel=0.0, ulysses_degree=degree) for degree in (16, 8)
    )
    assert two - one == pytest.approx((2 + 2) * 2 * tokens * 8 * 128 * 2)
    # A trade takes no more where the kernel needs as much while it lasts.
    assert attention_buffers("ulysses", LLAMA, tokens, kernel=one, ulysses_degree=8) - one == pytest.approx(
        2 * tokens * 4096 * 2
    )
    memory = step_memory(LLAMA, schedule="none", tokens=tokens, num_gpus=1)
    assert memory.parameters == pytest.approx(4 * LLAMA.parameters + WORKSPACE)
    assert memory.host == pytest.approx(12 * LLAMA.parameters + 32 * tokens * 4096 * 2)


@pytest.mark.parametrize(
    ("model", "context", "seconds"),
    [("qwen3-8b", M, 380), ("qwen3-32b", M, 1295), ("qwen3-0.6b", 4 * M, 2135)],
)
def test_published_steps_that_did_not_calibrate_are_met_within_a_tenth(model, context, seconds):
    """A change of the model that fits its one calibrating row and loses all others."""
    step = simulate(MODELS[model], H100, MeshConfig(cp_ring=8), context=context, num_gpus=8, sequences=1)
    assert step.seconds == pytest.approx(seconds, rel=0.1)
