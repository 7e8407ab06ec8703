"""The estimate of a training step's memory: tensors that are really alive, and what must move it."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.plan import CASES, Case, measure

from longspan.core.errors import ArgumentError
from longspan.core.mesh_config import MeshConfig
from longspan.plan.block import block_walk, flash_backward_bytes
from longspan.plan.hardware import GPUS
from longspan.plan.models import MODELS
from longspan.plan.training import training_memory
from longspan.plan.training_step import Adapters, MemoryConfig, TrainingStep

LLAMA = MODELS["llama-3-8b"]
DEFAULT = {
    "plain", "blocks computed again", "inputs on the host", "tiled MLP", "vocabulary 32,000", "LoRA",
    "LoRA of queries and values", "chunks, keys on the host",
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case.name in DEFAULT else pytest.mark.slow)
        for case in CASES
    ],
)
def test_estimate_is_within_a_tenth_of_what_is_alive(case: Case) -> None:
    """A tensor that the estimate forgets, or that a change of the training step keeps alive longer."""
    counted = measure(case)
    assert training_memory(case.shape, case.step).device == pytest.approx(counted, rel=0.1)


def test_the_cases_are_there() -> None:
    """A renamed case would be slow without a word."""
    assert {case.name for case in CASES} > DEFAULT


def test_parts_by_hand() -> None:
    """Llama-3-8B on 8 GPUs: 8.03e9 weights in fp32 with two moments; 32 block inputs of 16,384 x 4,096 in bf16."""
    settings = TrainingStep(
        131072,
        parallel=MeshConfig(cp_ring=8),
        memory=MemoryConfig(compute_dtype="bfloat16", activation_checkpointing="full"),
    )
    memory = training_memory(LLAMA, settings)
    parts = memory.moments["loss"]
    assert parts["parameters"] == pytest.approx(LLAMA.parameters * 4 / 8)
    assert parts["optimizer state"] == pytest.approx(LLAMA.parameters * 8 / 8)
    # Beside them the last hidden states before and after the norm, and in fp32.
    assert parts["layer inputs"] == pytest.approx(16384 * 4096 * (32 * 2 + 2 + 2 + 4))
    assert memory.host == {}


def test_what_goes_to_the_host_leaves_the_device() -> None:
    """An offload that is counted on neither side, or on both."""
    settings = TrainingStep(
        65536,
        parallel=MeshConfig(dp_shard=8),
        memory=MemoryConfig(
            compute_dtype="bfloat16", activation_checkpointing="offload", offload_parameters=True
        ),
    )
    memory = training_memory(LLAMA, settings)
    norms = (2 * 32 + 1) * 4096
    assert memory.host == pytest.approx({
        # Pinned: q and o 8 MiB and k and v 2 MiB a rank as they are; 28 MiB of an MLP matrix take 32, 250.5 of the
        # embeddings 256.
        "parameters": (32 * (2 * 8 + 2 * 2 + 3 * 32) + 2 * 256) * 2**20 + norms * 4 / 8,
        "optimizer state": LLAMA.parameters,
        "gradients": LLAMA.parameters * 4 / 8,
        "layer inputs": 32 * 65536 * 4096 * 2,
    })  # fmt: skip
    assert not any("optimizer state" in parts or "parameters" in parts for parts in memory.moments.values())


def test_the_cache_of_chunks_is_what_the_length_costs() -> None:
    """Llama-3-8B in bf16: 128 KiB of keys and values and 256 KiB of gradients a token, nothing else."""
    sizes = [
        training_memory(
            LLAMA,
            TrainingStep(
                tokens,
                dtype="bfloat16",
                memory=MemoryConfig(
                    chunk_tokens=8192, activation_checkpointing="full", offload_chunk_cache=True
                ),
            ),
        )
        for tokens in (2**17, 2**18)
    ]
    assert sizes[1].host_bytes - sizes[0].host_bytes == 2**17 * (128 + 256) * 1024
    # Ids, labels, positions and losses.
    assert sum(sizes[1].moments["loss"].values()) - sum(sizes[0].moments["loss"].values()) == 2**17 * 32


def test_weights_in_four_bits() -> None:
    """QLoRA keeps a layer in 4.13 bits a weight; embeddings stay as they are."""
    settings = TrainingStep(8192, dtype="bfloat16", lora=Adapters(32, quantized=True))
    parameters = training_memory(LLAMA, settings).moments["optimizer"]["parameters"]
    adapters = 32 * 32 * (2 * 4096 + 2 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336)) * 4
    layers = 32 * LLAMA.layer_parameters * 4.127 / 8
    assert parameters == pytest.approx(adapters + layers + (2 * 128256 + 1) * 4096 * 2)


def test_wrong_settings_are_refused() -> None:
    """An estimate for what the trainer refuses."""
    with pytest.raises(ArgumentError, match="single matrices"):
        training_memory(LLAMA, TrainingStep(4096, parallel=MeshConfig(tp=2)))
    with pytest.raises(ArgumentError, match="whole rows"):
        training_memory(
            LLAMA, TrainingStep(4096, parallel=MeshConfig(cp_ring=2), memory=MemoryConfig(chunk_tokens=1024))
        )


def test_limits_say_which_memory() -> None:
    """A verdict that blames the GPU for a full host."""
    gpu = GPUS["h100"]
    fits = training_memory(
        LLAMA,
        TrainingStep(
            8192,
            parallel=MeshConfig(dp_shard=8),
            memory=MemoryConfig(compute_dtype="bfloat16", activation_checkpointing="offload", tiled_mlp=1024),
        ),
    )
    assert fits.limit(gpu, 8) is None
    assert fits.limit(gpu._replace(memory=10e9), 8) == "device memory"
    assert fits.limit(gpu._replace(host_memory=1e9), 8) == "host memory"


@pytest.mark.parametrize(("dtype", "head_dim"), [("float32", 128), ("bfloat16", 512)])
def test_attention_without_a_flash_kernel_is_linear_in_memory_and_counted(dtype: Any, head_dim: int) -> None:
    """fp32 or a head of 512 on CUDA is computed in tiles, whose scores the estimate left out."""
    shape = LLAMA._replace(head_dim=head_dim, hidden=512)

    def peak(tokens: int, *, cuda: bool = True) -> float:
        tiled = MemoryConfig(tiled_mlp=512)
        return block_walk(shape, TrainingStep(tokens, dtype=dtype, memory=tiled, cuda=cuda)).backward

    # Five times the scores of one tile of 256 MiB, where the flash kernel sums dq.
    query = 2 * shape.heads * shape.head_dim * 4
    assert peak(2) > 5 << 28 > peak(2, cuda=False) + query
    assert peak(1 << 17) < 8 * peak(1 << 14)


def test_the_flash_backward_needs_more_than_its_gradients() -> None:
    """Llama-3-8B at 131,072 local tokens: dk and dv of all 32 heads are 2 GiB; 8,192 documents 16 GiB of dq's sums."""
    step = TrainingStep(131072, dtype="bfloat16")
    needed = {
        name: flash_backward_bytes(LLAMA._replace(**shape), step._replace(documents=documents)) / 2**30
        for name, shape, documents in (
            ("grouped", {}, 1), ("not grouped", {"kv_heads": 32}, 1), ("documents", {}, 8193),
            ("80", {"head_dim": 80}, 1), ("96", {"head_dim": 96}, 1),
        )
    }  # fmt: skip
    assert needed["grouped"] - needed["not grouped"] == 2
    assert needed["documents"] - needed["grouped"] == 16
    assert needed["96"] - needed["80"] == 2 * 131072 * 32 * 16 * 2 / 2**30
    step = step._replace(memory=MemoryConfig(tiled_mlp=1024))
    block = [block_walk(LLAMA, step._replace(documents=documents)).backward for documents in (1, 8193)]
    assert block[1] - block[0] > 8 * 2**30


def test_pinned_memory_comes_in_powers_of_two() -> None:
    """An input of 640 MiB a block takes 1 GiB of the host, and a chunk of 12,288 tokens what 16,384 take."""
    settings = TrainingStep(
        81920,
        parallel=MeshConfig(dp_shard=8),
        memory=MemoryConfig(compute_dtype="bfloat16", activation_checkpointing="offload"),
    )
    assert training_memory(LLAMA, settings).host == {"layer inputs": 32 * 2**30}
    unpinned = training_memory(LLAMA, settings._replace(cuda=False))
    assert unpinned.host == {"layer inputs": 32 * 640 * 2**20}
    chunks = TrainingStep(
        12288 * 5, dtype="bfloat16", memory=MemoryConfig(chunk_tokens=12288, offload_chunk_cache=True)
    )
    assert training_memory(LLAMA, chunks).host["key/value cache"] == 4 * 16384 * (128 + 256) * 1024
