"""A row walked in chunks trains like the row at once: loss, every gradient, and memory that does not grow with it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.live_bytes import LiveBytes
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.errors import ArgumentError
from longspan.core.heartbeat import watched_by
from longspan.kernels.attention import api
from longspan.kernels.attention.reference import ReferenceKernel
from longspan.kernels.loss import LossSum
from longspan.kernels.tiled_mlp import enable_tiled_mlp
from longspan.models import chunk_cache, recurrent
from longspan.models.checkpointing import enable_checkpointing
from longspan.models.chunk_cache import ChunkCache
from longspan.models.hf import Documents, build_model
from longspan.models.lora import apply_lora
from longspan.models.lora_config import LoraConfig
from longspan.models.recurrent import ChunkedRow
from longspan.parallel.fsdp import full_tensor, shard_model
from longspan.parallel.launch import spawn_local
from longspan.parallel.mesh import MeshConfig, build_mesh
from longspan.train.batch import IGNORE_LABEL, Batch
from longspan.train.objectives import ModelWithLoss
from longspan.train.recurrent import recurrent_step
from tests.patience import PATIENCE_SECONDS

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
# Documents that end inside chunks, on their borders (chunks of 32), and fill several.
BORDERS = [0, 20, 32, 33, 150, 160, 203]


def batch_of(borders: list[int], *, weighted: bool = False, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY["vocab_size"], (borders[-1],), generator=generator)
    documents = Documents.from_cu_seqlens(borders)
    labels = ids.roll(-1)
    labels[torch.tensor(borders[1:]) - 1] = IGNORE_LABEL
    weights = torch.rand(borders[-1], generator=generator) if weighted else None
    zeros = torch.zeros(borders[-1], dtype=torch.long)
    return Batch(ids, labels, weights, documents.positions(), zeros, ("text",), documents)


def model_of(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    return build_model({**TINY, **fields}, seed=0).to(dtype).train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def at_once(model: torch.nn.Module, batch: Batch, weight: float) -> LossSum:
    result = ModelWithLoss(model)(batch)
    (result.loss / weight).backward()
    return result


def check_equal(model: torch.nn.Module, batch: Batch, *, tolerance: float = 1e-5, **settings: Any) -> None:
    """Compare loss, loss of each token and every gradient with those of the batch at once."""
    weight = 37.0
    expected = at_once(model, batch, weight)
    truth = gradients(model)
    found = recurrent_step(model, batch, weight=weight, **settings)
    mine = gradients(model)
    assert not found.loss.requires_grad and found.loss.dtype == expected.loss.dtype
    assert abs(found.loss.item() - expected.loss.item()) <= tolerance * expected.loss.item()
    torch.testing.assert_close(found.per_token_nll, expected.per_token_nll, rtol=0, atol=10 * tolerance)
    assert truth.keys() == mine.keys() and truth
    for name, gradient in truth.items():
        error = float((mine[name] - gradient).norm())
        # Documents of two tokens have gradients that are 0 but for rounding.
        assert error <= tolerance * float(gradient.norm()) + 1e-4 * tolerance, (name, error)
    assert any(gradient.norm() > 1e-3 for gradient in truth.values())


@pytest.mark.both_kernels
@pytest.mark.parametrize("chunk_tokens", [1, 32, 37, 203, 1000])
def test_equals_the_row_at_once(chunk_tokens: int) -> None:
    """Chunks that divide nothing, cut documents anywhere, hold several, or hold the whole row."""
    borders = BORDERS if chunk_tokens > 1 else [0, 5, 16]
    check_equal(model_of(), batch_of(borders, weighted=True), chunk_tokens=chunk_tokens)


@pytest.mark.both_kernels
@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"model_type": "qwen3", "head_dim": 16},
        # A window shorter than a chunk, one that spans several chunks, and one next to full attention.
        {"model_type": "mistral", "sliding_window": 9},
        {"model_type": "mistral", "sliding_window": 80},
        {
            "model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 24,
            "max_window_layers": 1,
        },
        {"tie_word_embeddings": True},
    ],
)  # fmt: skip
def test_equals_on_other_models(fields: dict[str, Any]) -> None:
    """Shared heads, windows that a layer has and another has not, one embedding for both ends."""
    check_equal(model_of(**fields), batch_of(BORDERS), chunk_tokens=32)


@pytest.mark.both_kernels
def test_a_window_over_the_end_of_a_chunk() -> None:
    """Five keys that a chunk leaves to a window with 28 queries: on CUDA pairs were lost, and merging made NaN."""
    check_equal(model_of(model_type="mistral", sliding_window=24), batch_of([0, 28, 120]), chunk_tokens=33)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=5),
    chunk_tokens=st.integers(1, 24),
    window=st.none() | st.integers(1, 20),
    kv_heads=st.sampled_from([1, 2, 4]),
    offload=st.booleans(),
)
def test_equals_whatever_the_cut(
    lengths: list[int], chunk_tokens: int, window: int | None, kv_heads: int, offload: bool
) -> None:
    """In fp64 and with the reference kernel nothing but the order of sums is left: 1e-11, for any documents."""
    borders = [sum(lengths[:end]) for end in range(len(lengths) + 1)]
    borders.append(borders[-1] + 2)  # at least one label
    model = model_of(
        torch.float64, model_type="mistral", sliding_window=window, num_key_value_heads=kv_heads,
        num_hidden_layers=2, hidden_size=16, intermediate_size=16,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module in (recurrent, api):
            patch.setattr(module, "choose_kernel", lambda device, **_: ReferenceKernel())
        check_equal(model, batch_of(borders), tolerance=1e-11, chunk_tokens=chunk_tokens, offload=offload)


@pytest.mark.parametrize(("checkpointing", "blocks"), [("none", 0), ("full", 3), ("offload", 3)])
def test_every_chunk_and_block_is_a_sign_of_life(checkpointing: Any, blocks: int) -> None:
    """A step of 512K tokens takes longer than any timeout: the watchdog must hear of what goes on inside."""
    beats: list[None] = []
    model = enable_checkpointing(model_of(), checkpointing)
    with watched_by(lambda: beats.append(None)):
        recurrent_step(model, batch_of([0, 96]), weight=1.0, chunk_tokens=32)
    # Two chunks are walked first, without a graph; all three again with one, and each block twice there.
    assert len(beats) == (2 + 3) + 3 * 2 * blocks + (2 * blocks if blocks else 0)


@pytest.mark.both_kernels
@pytest.mark.parametrize("checkpointing", ["none", "full", "offload"])
def test_composes_with_what_saves_memory(checkpointing: Any) -> None:
    """A block that is computed again must read the cache as it was; a tile is a part of a chunk."""
    model = enable_checkpointing(enable_tiled_mlp(model_of(), 10), checkpointing)
    check_equal(model, batch_of(BORDERS), chunk_tokens=32, offload=checkpointing == "offload")


@pytest.mark.both_kernels
@pytest.mark.parametrize(
    "trained",
    [
        # What does not reach keys, what reaches only the queries of the first layer, and what lies above it.
        ["lm_head"],
        ["layers.0.self_attn.q_proj"],
        ["layers.1.self_attn.v_proj", "layers.2.mlp"],
        ["embed_tokens"],
    ],
)
def test_frozen_weights(trained: list[str]) -> None:
    """Layers below the first trained weight have no backward pass: no gradient may wait for one that never comes."""
    model = model_of()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    check_equal(model, batch_of(BORDERS), chunk_tokens=32)


@pytest.mark.both_kernels
def test_gradients_add_up_over_batches() -> None:
    """A step of several batches; each weighs by its tokens, and one without labels adds nothing."""
    model = model_of()
    batches = [batch_of(BORDERS), batch_of([0, 50], seed=1), batch_of([0, 40], seed=2)]
    batches[2] = batches[2]._replace(labels=torch.full((40,), IGNORE_LABEL))
    for batch in batches:
        at_once(model, batch, 240.0)
    truth = gradients(model)
    results = [recurrent_step(model, batch, chunk_tokens=32, weight=240.0) for batch in batches]
    assert results[2].loss.item() == 0
    for name, gradient in gradients(model).items():
        assert (gradient - truth[name]).norm() <= 1e-5 * truth[name].norm(), name


def test_a_step_without_labels_changes_nothing() -> None:
    """Its weight is 0, and 0/0 would make every weight NaN."""
    model, batch = model_of(), batch_of(BORDERS)
    batch = batch._replace(labels=torch.full_like(batch.labels, IGNORE_LABEL))
    result = recurrent_step(model, batch, chunk_tokens=32, weight=0.0)
    assert result.loss.item() == 0 and result.per_token_nll.shape == (203,)
    assert gradients(model) == {}


@pytest.mark.both_kernels
def test_both_walks_drop_the_same_neurons() -> None:
    """Keys that are read were made with one mask; with another in the second walk, gradients are of no function."""
    torch.manual_seed(0)
    model = model_of()
    dropout = torch.nn.Dropout(0.5)
    model.base_model.layers[1].self_attn.v_proj.register_forward_hook(lambda _, args, out: dropout(out))
    masked: list[torch.Tensor] = []
    model.base_model.layers[1].self_attn.v_proj.register_forward_hook(
        lambda _, args, out: masked.append(out[0, :, 0] == 0)
    )
    recurrent_step(model, batch_of([0, 64]), chunk_tokens=32, weight=1.0)
    first, last, again = masked
    assert torch.equal(first, again) and not torch.equal(first, last)


def test_bf16_gradients_are_summed_before_they_are_rounded() -> None:
    """Each of many chunks adds less than bf16 resolves of the sum: the error must not grow with their number."""
    batch = batch_of([0, 160])
    truth_model = model_of(torch.bfloat16).float()
    at_once(truth_model, batch, 160.0)
    truth = gradients(truth_model)
    errors = []
    for chunk_tokens in (160, 4):
        model = model_of(torch.bfloat16)
        recurrent_step(model, batch, chunk_tokens=chunk_tokens, weight=160.0)
        mine = gradients(model)
        assert all(gradient.dtype == torch.bfloat16 for gradient in mine.values())
        name = "lm_head.weight"
        errors.append(float((mine[name].float() - truth[name]).norm() / truth[name].norm()))
    assert errors[1] <= 1.3 * errors[0], errors


def test_only_what_is_read_later_is_kept() -> None:
    """Keys of documents that end in their chunk, or outside a layer's window, would be memory for nothing."""
    row = ChunkedRow(Documents.from_cu_seqlens([0, 6, 10, 16, 32]), 8)
    assert [row.is_read_later(chunk) for chunk in range(4)] == [True, False, True, False]
    assert [row.kept(chunk, None) for chunk in (0, 2)] == [slice(6, 8), slice(16, 24)]
    assert row.kept(2, 4) == slice(21, 24) and row.kept(2, 1) == slice(24, 24)
    assert row.kept(1, None) == slice(16, 16)


def test_chunks_that_nobody_reads_run_once() -> None:
    """Rows of short documents on the borders of chunks need no first walk."""
    model = model_of()
    runs: list[int] = []
    model.base_model.embed_tokens.register_forward_hook(lambda _, args, out: runs.append(args[0].shape[1]))
    recurrent_step(model, batch_of([0, 32, 64, 90, 100]), chunk_tokens=32, weight=1.0)
    assert runs == [32, 4, 32, 32, 32]  # only the third chunk, whose last document goes on, runs twice


@pytest.mark.both_kernels
def test_the_cache_is_empty_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that nobody took is a gradient that is missing; what stays is memory lost."""
    caches: list[ChunkCache] = []
    peaks: list[int] = []
    release = ChunkCache.release

    def note(self: ChunkCache, chunk: int) -> None:
        caches.append(self)
        peaks.append(self.num_bytes)
        assert not [key for key in self._gradients if key[1] == chunk]
        release(self, chunk)

    monkeypatch.setattr(ChunkCache, "release", note)
    recurrent_step(model_of(), batch_of([0, 96]), chunk_tokens=32, weight=1.0)
    assert caches[0]._kept == {} and caches[0]._gradients == {}
    # Keys, values and gradients of 64 tokens, 3 layers, 2 heads of 8 in fp32; then of 32 (32 have been read).
    assert peaks[0] == 2 * 64 * 3 * 2 * 2 * 8 * 4 and peaks[-1] == 32 * 3 * 2 * 2 * 8 * 4


def peak_beside_the_cache(tokens: int, chunk_tokens: int | None) -> int:
    """Return the most bytes of tensors alive at once beside the cache and [tokens] columns of the batch."""
    model = enable_tiled_mlp(model_of(), 16)
    batch = batch_of([0, tokens // 3, tokens])
    with LiveBytes() as counter, pytest.MonkeyPatch.context() as patch:
        leave = ChunkCache._leave

        def elsewhere(self: ChunkCache, tensor: torch.Tensor, into: Any = None) -> torch.Tensor:
            kept = leave(self, tensor, into)
            counter.move_to_host(kept)
            return kept

        patch.setattr(ChunkCache, "_leave", elsewhere)
        if chunk_tokens is None:
            at_once(model, batch, 1.0)
        else:
            recurrent_step(model, batch, chunk_tokens=chunk_tokens, weight=1.0, offload=True)
    return counter.peak


def test_the_working_set_does_not_grow_with_the_length() -> None:
    """Counts the bytes of all living tensors: a chunk's activations, whatever the row. A row at once is the control."""
    short, long = (peak_beside_the_cache(tokens, 32) for tokens in (192, 576))
    # Five int64 columns of the batch and its losses; one activation of the hidden size would be 128 bytes a token.
    assert long - short <= 48 * (576 - 192), (short, long)
    whole = [peak_beside_the_cache(tokens, None) for tokens in (192, 576)]
    assert whole[1] - whole[0] > 4000 * (576 - 192), whole


def test_wrong_settings_are_refused() -> None:
    """A chunk without tokens would never end."""
    with pytest.raises(ArgumentError, match="at least one token"):
        recurrent_step(model_of(), batch_of(BORDERS), chunk_tokens=0, weight=1.0)
    sharded = batch_of(BORDERS)._replace(documents=object())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="whole rows"):
        recurrent_step(model_of(), sharded, chunk_tokens=8, weight=1.0)
    nameless = model_of()
    for layer in nameless.base_model.layers:
        layer.self_attn.layer_idx = None
    with pytest.raises(ArgumentError, match="does not number its attention layers"):
        recurrent_step(nameless, batch_of(BORDERS), chunk_tokens=8, weight=1.0)


@pytest.mark.both_kernels
def test_composes_with_adapters() -> None:
    """Gradients of adapters on keys and values come through the cache; the frozen weights below them have none."""
    pytest.importorskip("peft", reason="LoRA needs peft")
    model = apply_lora(
        model_of(), LoraConfig(rank=4, target_modules=("q_proj", "k_proj", "v_proj")), seed=0
    ).train()
    with torch.no_grad():  # B starts at 0, which hides the gradient of A
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.ones_like(parameter)
    check_equal(enable_checkpointing(model, "full"), batch_of(BORDERS), chunk_tokens=32)


def sharded_errors(rank: int) -> list[float]:
    """Return the error of each gradient of two ranks that walk different documents; module level for spawned ranks."""
    batches = [batch_of([0, 32, 64, 100]), batch_of([0, 100], seed=1)]
    model = model_of()
    for batch in batches:
        at_once(model, batch, 200.0)
    truth = gradients(model)
    mesh = build_mesh(MeshConfig(dp_shard=2), "cpu", timeout_seconds=PATIENCE_SECONDS).fsdp
    assert mesh is not None
    root = ModelWithLoss(enable_checkpointing(model, "full"))
    shard_model(root, mesh)
    recurrent_step(root, batches[rank], chunk_tokens=32, weight=200.0)
    return [
        float((full_tensor(parameter.grad) - truth[name]).norm() / truth[name].norm())
        for name, parameter in model.named_parameters()
    ]


def test_composes_with_fsdp2() -> None:
    """Ranks gather parameters together: one whose documents need no first walk must not leave the other waiting."""
    for errors in spawn_local(sharded_errors, 2, timeout_seconds=PATIENCE_SECONDS):
        assert len(errors) > 20 and max(errors) <= 1e-5, errors


def test_micro_batches_share_one_stream_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream for each micro-batch had an allocator pool each, whose memory no other stream gets back."""
    made: list[Any] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    chunk_cache._stream.cache_clear()
    for _ in range(3):
        with ChunkCache(offload=True)._copying(torch.device("cuda", 0), behind_compute=True) as found:
            assert found is stream
    chunk_cache._stream.cache_clear()
    assert made == [torch.device("cuda", 0)]
