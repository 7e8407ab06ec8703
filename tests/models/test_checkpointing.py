"""What blocks keep for their backward pass: the same gradients, one tensor a block, and its memory given back."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.multiprocessing.reductions import StorageWeakRef

from longspan.core.errors import ArgumentError
from longspan.kernels.loss import linear_cross_entropy
from longspan.kernels.tiled_mlp import enable_tiled_mlp
from longspan.models.checkpointing import HostOffload, enable_checkpointing
from longspan.models.hf import Documents, build_model, hidden_states, lm_head_weight

LAYERS, TOKENS, HIDDEN = 4, 90, 48
TINY = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
BORDERS = [0, 40, 47, 90]


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (TOKENS,), generator=torch.Generator().manual_seed(seed))


def loss_of(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    states = hidden_states(model, tokens(seed), Documents.from_cu_seqlens(BORDERS))
    return linear_cross_entropy(states, lm_head_weight(model), tokens(seed + 100), chunk_tokens=32).loss


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def offload_of(model: Any) -> HostOffload:
    return model.base_model.layers[0]._gradient_checkpointing_func


def model_with(mode: Any, **fields: Any) -> Any:
    return enable_checkpointing(build_model({**TINY, **fields}, seed=0).train(), mode)


@pytest.mark.parametrize("fields", [{}, {"model_type": "qwen3", "head_dim": 16}])
@pytest.mark.parametrize("mode", ["full", "offload"])
def test_gradients_are_the_same_bits(mode: str, fields: dict[str, Any]) -> None:
    """The document table must reach what is computed again, and the tensor must come back as it went."""
    truth, found = gradients(model_with("none", **fields)), gradients(model_with(mode, **fields))
    for name in truth:
        assert torch.equal(truth[name], found[name]), name


def test_one_tensor_a_block_is_offloaded() -> None:
    """More would be bandwidth spent on masks and positions; fewer, a block that keeps its activations."""
    model = model_with("offload")
    offload = offload_of(model)
    assert offload.num_tensors == 0
    loss = loss_of(model)
    assert offload.num_tensors == LAYERS
    assert offload.num_bytes == LAYERS * TOKENS * HIDDEN * 4
    loss.backward()
    assert offload.num_tensors == LAYERS  # computing again sends nothing


def block_inputs(model: Any) -> list[StorageWeakRef]:
    """Return a list that fills with the storage of each block's input."""
    seen: list[StorageWeakRef] = []
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(
            lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage()))
        )
    return seen


def test_device_copies_are_freed() -> None:
    """A forgotten reference would keep every input on the device beside its copy. The last one stays for its use."""
    for mode, alive in [("full", LAYERS), ("offload", 1)]:
        model = model_with(mode)
        seen = block_inputs(model)
        loss = loss_of(model)
        assert len(seen) == LAYERS
        assert sum(not ref.expired() for ref in seen) == alive
        loss.backward()
        del loss
        assert all(ref.expired() for ref in seen[:LAYERS])


def test_host_copies_are_freed_after_the_step() -> None:
    """A chain from each step to the one before would fill the host."""
    model = model_with("offload")
    offload = offload_of(model)
    for _ in range(2):
        loss_of(model).backward()
        assert offload._latest is not None and offload._latest() is None
        assert offload._in_flight is None


def test_each_tensor_is_fetched_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching when it is needed makes every block wait for the bus; fetching all at once fills the device."""
    model = model_with("offload")
    events: list[tuple[str, int]] = []
    index_of: dict[int, int] = {}
    fetch, unpack, pack = HostOffload._fetch, HostOffload._unpack, HostOffload._pack

    def note_pack(self: HostOffload, tensor: torch.Tensor) -> Any:
        saved = pack(self, tensor)
        index_of[id(saved)] = len(index_of)
        return saved

    def note_fetch(self: HostOffload, saved: Any) -> None:
        events.append(("fetch", index_of[id(saved)]))
        fetch(self, saved)

    def note_unpack(self: HostOffload, saved: Any) -> torch.Tensor:
        events.append(("use", index_of[id(saved)]))
        return unpack(self, saved)

    monkeypatch.setattr(HostOffload, "_pack", note_pack)
    monkeypatch.setattr(HostOffload, "_fetch", note_fetch)
    monkeypatch.setattr(HostOffload, "_unpack", note_unpack)
    loss_of(model).backward()
    # The last one, 3, is still there.
    assert events == [
        ("use", 3),
        ("fetch", 2),
        ("use", 2),
        ("fetch", 1),
        ("use", 1),
        ("fetch", 0),
        ("use", 0),
    ]


def test_graphs_may_cross() -> None:
    """Two micro-batches go forward before either goes back, one twice, and a third never."""
    plain, model = model_with("none"), model_with("offload")
    for each in (plain, model):
        documents = Documents.from_cu_seqlens(BORDERS)
        first, second, _ = (hidden_states(each, tokens(seed), documents).square().sum() for seed in (1, 2, 3))
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
    for truth, found in zip(plain.base_model.parameters(), model.base_model.parameters()):
        assert torch.equal(truth.grad, found.grad)


def test_composes_with_tiles_and_frozen_weights() -> None:
    """A frozen embedding gives the first block an input without gradient, which must be kept all the same."""
    plain, model = model_with("none"), enable_tiled_mlp(model_with("offload"), 16)
    for each in (plain, model):
        each.get_input_embeddings().requires_grad_(False)
        loss_of(each).backward()
    assert offload_of(model).num_tensors == LAYERS
    for (name, truth), found in zip(plain.named_parameters(), model.parameters()):
        if truth.grad is None:
            assert found.grad is None, name
        else:
            assert (found.grad - truth.grad).norm() <= 1e-6 * truth.grad.norm(), name


def test_nothing_is_offloaded_without_gradients() -> None:
    """Evaluation between steps must not pay for it, and `none` must undo it."""
    model = model_with("offload")
    offload = offload_of(model)
    with torch.no_grad():
        loss_of(model)
    loss_of(model.eval()).backward()
    loss_of(enable_checkpointing(model.train(), "none")).backward()
    assert offload.num_tensors == 0


def test_unknown_mode_and_unsupported_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a misspelt mode that silently keeps everything."""
    model = build_model(TINY, seed=0)
    with pytest.raises(ArgumentError, match="none, full, offload"):
        enable_checkpointing(model, "ful")  # type: ignore[arg-type]
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ArgumentError, match="LlamaForCausalLM does not support activation checkpointing"):
        enable_checkpointing(model, "full")
    enable_checkpointing(model, "none")


def sharded_gradients(rank: int, world: int, store: str, folder: str) -> None:
    """Write the gradients of two micro-batches, one per rank, under FSDP2 with everything on."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for name, policy in [("plain", {}), ("cpu", {"offload_policy": CPUOffloadPolicy(pin_memory=False)})]:
        for mode in ("none", "full", "offload"):
            for tile_tokens in (None, 16):
                model = model_with(mode)
                if tile_tokens is not None:
                    enable_tiled_mlp(model, tile_tokens)
                for layer in model.base_model.layers:
                    fully_shard(layer, **policy)
                fully_shard(model.base_model, **policy)
                states = model.base_model(
                    input_ids=tokens(rank)[None],
                    position_ids=Documents.from_cu_seqlens(BORDERS).positions()[None],
                    documents=Documents.from_cu_seqlens(BORDERS),
                    use_cache=False,
                ).last_hidden_state
                states.square().mean().backward()
                found = {
                    key: parameter.grad.full_tensor()
                    for key, parameter in model.base_model.named_parameters()
                }
                if rank == 0:
                    torch.save(found, Path(folder) / f"{name}-{mode}-{tile_tokens}.pt")
    dist.destroy_process_group()


def test_composes_with_fsdp2() -> None:
    """Gradients averaged over two ranks must be those of one process, each reduced once, in every combination."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(sharded_gradients, args=(2, f"{folder}/store", folder), nprocs=2)
        results = {path.stem: torch.load(path) for path in Path(folder).glob("*.pt")}
    assert len(results) == 12
    model = model_with("none")
    for rank in range(2):
        documents = Documents.from_cu_seqlens(BORDERS)
        (hidden_states(model, tokens(rank), documents).square().mean() / 2).backward()
    for label, found in results.items():
        for name, parameter in model.base_model.named_parameters():
            error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error <= 1e-5, (label, name, error.item())
