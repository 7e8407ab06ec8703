"""Estimated memory of a training step beside the tensors that are really alive in one.

    python -m benchmarks.plan

Small models of Llama's kind make two optimizer steps on CPU, one setting after another. Every tensor that lives is
counted, at every operation; what an accelerator would keep on the host counts as host memory. The peak of the second
step stands beside `longspan.plan.training`'s, which is told that attention and loss compute as on a CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from benchmarks.live_bytes import LiveBytes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from longspan.core.mesh_config import MeshConfig
from longspan.kernels.tiled_mlp import enable_tiled_mlp
from longspan.models import checkpointing
from longspan.models.checkpointing import enable_checkpointing
from longspan.models.chunk_cache import ChunkCache
from longspan.models.hf import Documents, build_model
from longspan.models.hf_config import new_config
from longspan.models.lora import LoraConfig, apply_lora
from longspan.models.shape import model_shape
from longspan.parallel.fsdp import shard_model
from longspan.parallel.launch import spawn_local
from longspan.plan.models import ModelShape
from longspan.plan.training import training_memory
from longspan.plan.training_step import Adapters, MemoryConfig, TrainingStep
from longspan.train.batch import IGNORE_LABEL, Batch
from longspan.train.config import OptimizerConfig
from longspan.train.objectives import ModelWithLoss
from longspan.train.optim import build_optimizers
from longspan.train.recurrent import recurrent_step

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
TOKENS = 1024


class Case(NamedTuple):
    """A model and how it is trained."""

    name: str
    step: TrainingStep
    model: dict[str, Any]
    """A transformers configuration."""

    @property
    def shape(self) -> ModelShape:
        return model_shape(new_config(self.model, None))


def _case(name: str, fields: dict[str, Any] | None = None, tokens: int = TOKENS, **settings: Any) -> Case:
    memory = {name: settings.pop(name) for name in list(settings) if name in MemoryConfig.model_fields}
    step = TrainingStep(tokens, cuda=False, memory=MemoryConfig(**memory), **settings)
    return Case(name, step, {**MODEL, **(fields or {})})


CASES = (
    _case("plain"),
    _case("blocks computed again", activation_checkpointing="full"),
    _case("inputs on the host", {"num_hidden_layers": 8}, activation_checkpointing="offload"),
    _case("tiled MLP", tiled_mlp=64),
    _case("again, tiled", activation_checkpointing="full", tiled_mlp=64),
    _case("vocabulary 32,000", {"vocab_size": 32000}, activation_checkpointing="full"),
    _case("tied, vocabulary 8,000", {"vocab_size": 8000, "tie_word_embeddings": True}),
    _case("norms of heads", {"model_type": "qwen3", "head_dim": 32}),
    _case("bfloat16", dtype="bfloat16", activation_checkpointing="full"),
    _case("LoRA", lora=Adapters(8)),
    _case("LoRA of queries and values", lora=Adapters(8, targets=("q", "v"))),
    _case(
        "LoRA of the MLP, bfloat16",
        {"num_hidden_layers": 8},
        dtype="bfloat16",
        lora=Adapters(8, targets=("gate", "up", "down")),
    ),
    _case("LoRA, bfloat16", dtype="bfloat16", lora=Adapters(8)),
    _case(
        "LoRA, tied, vocabulary 8,000",
        {"vocab_size": 8000, "tie_word_embeddings": True},
        lora=Adapters(8),
    ),
    _case("LoRA, again", lora=Adapters(8), activation_checkpointing="full"),
    _case("Muon", tokens=256, optimizer="muon"),
    _case("chunks", chunk_tokens=128),
    _case("chunks, again, tiled", chunk_tokens=128, activation_checkpointing="full", tiled_mlp=64),
    _case("chunks, keys on the host", chunk_tokens=128, offload_chunk_cache=True),
    _case(
        "2 ranks, bf16 beside fp32",
        parallel=MeshConfig(dp_shard=2),
        compute_dtype="bfloat16",
        activation_checkpointing="full",
    ),
)


class Counter(LiveBytes):
    """Looks into sharded tensors, and at the size that a storage has now: FSDP empties and refills its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.peak
        out = super().__torch_dispatch__(func, types, args, kwargs)
        now = sum(
            storage.nbytes() for ref, _, host in list(self._alive.values()) if not host and (storage := ref())
        )
        self.peak = max(before, now)
        return out

    def _note(self, tensor: torch.Tensor, *, on_host: bool = False) -> None:
        super()._note(tensor._local_tensor if isinstance(tensor, DTensor) else tensor, on_host=on_host)


def measure(case: Case) -> int:
    """Return the most bytes alive in the second optimizer step."""
    if case.step.parallel.shards > 1:
        return max(spawn_local(_steps_sharded, case.step.parallel.shards, case, timeout_seconds=200))
    return _steps(case, mesh=None)


def _steps_sharded(rank: int, case: Case) -> int:
    return _steps(case, mesh=init_device_mesh("cpu", (case.step.parallel.shards,)))


def _steps(case: Case, mesh: Any) -> int:
    s, fields = case.step, case.model
    with Counter() as counter, _host_memory(counter):
        model = build_model({**fields, "dtype": s.dtype}, seed=0).train()
        if s.lora is not None:
            names = tuple(f"{name}_proj" for name in s.lora.targets)
            apply_lora(model, LoraConfig(rank=s.lora.rank, target_modules=names), seed=0)
        if s.memory.tiled_mlp is not None:
            enable_tiled_mlp(model, s.memory.tiled_mlp)
        enable_checkpointing(model, s.memory.activation_checkpointing)
        root = ModelWithLoss(model)
        if mesh is not None:
            shard_model(root, mesh, compute_dtype=getattr(torch, s.memory.compute_dtype or s.dtype))
            gc.collect()
        optimizers = build_optimizers(model, OptimizerConfig(name=s.optimizer))
        for step in range(2):
            if step == 1:
                counter.peak = 0
            _step(root, optimizers, s, fields["vocab_size"])
    return counter.peak


def _step(root: ModelWithLoss, optimizers: list[Any], s: TrainingStep, vocabulary: int) -> None:
    ids = torch.arange(s.tokens) * 7919 % vocabulary
    documents = Documents.single(s.tokens)
    labels = ids.roll(-1)
    labels[-1] = IGNORE_LABEL
    batch = Batch(ids, labels, None, documents.positions(), torch.zeros_like(ids), ("text",), documents)
    if s.memory.chunk_tokens is not None:
        recurrent_step(
            root,
            batch,
            chunk_tokens=s.memory.chunk_tokens,
            weight=1.0 * s.tokens,
            offload=s.memory.offload_chunk_cache,
        )
    else:
        (root(batch).loss / s.tokens).backward()
    torch.nn.utils.clip_grad_norm_(root.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


@contextmanager
def _host_memory(counter: LiveBytes) -> Iterator[None]:
    """Count what is sent away as host memory, and what comes back as a tensor of its own, as on an accelerator."""
    made, leave = checkpointing._Saved.__init__, ChunkCache._leave

    def note_saved(self: Any, tensor: torch.Tensor, before: Any) -> None:
        made(self, tensor, before)
        counter.move_to_host(self.host)

    def fetch(self: Any, saved: Any) -> None:
        self._settle()
        saved.on_device = saved.host.clone()

    def note_cache(self: ChunkCache, tensor: torch.Tensor, into: Any = None) -> torch.Tensor:
        kept = leave(self, tensor, into)
        if self.offload:
            counter.move_to_host(kept)
        return kept

    with ExitStack() as stack:
        stack.enter_context(patch.object(checkpointing._Saved, "__init__", note_saved))
        stack.enter_context(patch.object(checkpointing.HostOffload, "_fetch", fetch))
        stack.enter_context(patch.object(ChunkCache, "_leave", note_cache))
        yield


def main() -> None:
    """Print the table."""
    print(
        "| setting | counted, MB | estimated, MB | estimated / counted | peak at |\n|---|---:|---:|---:|---|"
    )
    for case in CASES:
        counted = measure(case)
        memory = training_memory(case.shape, case.step)
        print(
            f"| {case.name} | {counted / 1e6:.1f} | {memory.device / 1e6:.1f} | {memory.device / counted:.3f} "
            f"| {memory.moment} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
