"""A step of Llama-3-8B's shapes, 131,072 tokens, 8 and 64 ranks: FSDP2, the ring, the real loss; no data, no peers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from benchmarks.live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from longspan.kernels import loss
from longspan.kernels.attention import api, cuda_varlen
from longspan.kernels.tiled_mlp import enable_tiled_mlp
from longspan.models.checkpointing import enable_checkpointing
from longspan.models.hf import build_model
from longspan.parallel.fsdp import shard_model
from longspan.parallel.mesh import MeshConfig, build_mesh
from longspan.parallel.schedules import build_schedule
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.parallel.shards import SequenceShards
from longspan.train.batch import Batch
from longspan.train.objectives import ModelWithLoss

TOKENS = 131072
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": TOKENS,
}  # fmt: skip


@pytest.fixture
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A group of so many ranks of which this is the first, and the kernel of CUDA."""
    kernel = cuda_varlen.CudaVarlenKernel()
    monkeypatch.setattr(api, "_choose", lambda device_type: kernel)
    monkeypatch.setattr(loss, "cached_blocks", lambda logits_cv: [slice(None)])  # as on an accelerator
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "gib"), [(8, 15.3), (64, 14.1)], indirect=["world"])
def test_a_step_of_real_shapes_on_many_ranks(world: int, gib: float) -> None:
    """Shapes that fit at toy sizes only, and a tensor of the whole sequence or of all logits kept alive by one rank."""
    mesh = build_mesh(MeshConfig(cp_ring=world), "cpu")
    schedule = build_schedule("ring", ring_group=mesh.ring_group)
    table = ShardedDocuments(SequenceShards("zigzag", [0, 9, TOKENS], world), schedule)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(LLAMA, seed=0).train()
        enable_tiled_mlp(enable_checkpointing(model, "full"), 8192)
        root = ModelWithLoss(model)
        assert mesh.fsdp is not None
        shard_model(
            root, mesh.fsdp, compute_dtype=torch.bfloat16, reduce_dtype=torch.float32, offload=False, from_first=False
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        count = TOKENS // world
        ids, labels, positions, sources = (torch.zeros(count, dtype=torch.int64) for _ in range(4))
        batch = Batch(
            ids, labels, None, positions, sources, ("text",), table, places=torch.arange(count)  # type: ignore[arg-type]
        )  # fmt: skip
        with LiveBytes() as alive:
            result = root(batch)
            (result.loss / TOKENS).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert result.per_token_nll.shape == (count,)
    sharded = sum(p.numel() for p in model.parameters()) / world
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert sharded * 4 < alive.peak < gib * 2**30, alive.peak / 2**30
