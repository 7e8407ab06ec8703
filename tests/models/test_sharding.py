"""shard_batch and enable(schedule=...): what people with their own loop call."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import longspan
from longspan.core.errors import ArgumentError
from longspan.models.hf import enable
from longspan.models.sharding import SCHEDULE_ATTRIBUTE, shard_batch
from longspan.parallel.mesh import MeshConfig, build_mesh
from longspan.parallel.shards import SequenceShards
from tests.patience import PATIENCE_SECONDS

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_loop.py"


def tiny() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def alone() -> PreTrainedModel:
    return enable(tiny(), schedule="ring", mesh=build_mesh(MeshConfig(), "cpu"))


def losses(*words: str, processes: int) -> list[float]:
    command = [sys.executable, str(EXAMPLE), "--steps", "4", *words]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc-per-node={processes}", *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [float(number) for number in re.findall(r"loss ([\d.]+)", run.stdout)]


def test_the_example_loop_has_the_same_losses_on_one_and_on_four_processes() -> None:
    """Guards the drop-in: labels lost at rank borders, gradients averaged, a model that does not pass documents on."""
    one = losses(processes=1)
    assert len(one) == 4 and one[-1] < one[0]
    usp = losses("--schedule", "usp", "--ulysses", "2", processes=4)
    assert usp == pytest.approx(one, abs=1e-5)


def test_the_loss_is_that_of_each_document_alone() -> None:
    """Guards the shift: the last token of a document has no label, and no document sees another."""
    model = alone()
    tokens = torch.arange(1, 13)
    packed = model(**shard_batch(model, tokens, cu_seqlens=[0, 5, 12]))
    parts = [
        model(input_ids=part[None], labels=part[None]).loss * (len(part) - 1)
        for part in (tokens[:5], tokens[5:])
    ]
    assert packed.loss.item() == pytest.approx(sum(parts).item() / 10, abs=1e-6)


def test_labels_move_by_one_and_rows_are_documents() -> None:
    """Guards the keywords by eye: two rows of three tokens, one label taken out."""
    model = alone()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    labels = tokens.clone()
    labels[1, 1] = -100
    batch = shard_batch(model, tokens, labels=labels)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch["shift_labels"].tolist() == [[2, 3, -100, -100, 6, -100]]
    assert batch["num_items_in_batch"] == 3


def test_user_mistakes_are_named() -> None:
    """Guards the messages of a first try: no schedule, half of the pair, odd heads, wrong borders, nothing to train."""
    with pytest.raises(ArgumentError, match="no schedule"):
        shard_batch(enable(tiny()), torch.arange(4))
    with pytest.raises(ArgumentError, match="needs a mesh"):
        enable(tiny(), schedule="ring")
    model = alone()
    with pytest.raises(ArgumentError, match="does not fit the tokens"):
        shard_batch(model, torch.arange(4), cu_seqlens=[0, 3])
    for nothing in (torch.arange(0), torch.zeros(2, 0, dtype=torch.int64), torch.tensor(3)):
        with pytest.raises(ArgumentError, match="a batch has tokens"):
            shard_batch(model, nothing)
    with pytest.raises(ArgumentError, match="differ in shape"):
        shard_batch(model, torch.arange(4), labels=torch.arange(3))
    with pytest.raises(ArgumentError, match="without a label"):
        shard_batch(model, torch.arange(4), labels=torch.full((4,), -100))
    assert longspan.shard_batch is shard_batch


def test_a_rope_that_depends_on_the_length_needs_one() -> None:
    """Each rank would turn by the longest position that it happens to hold: other losses, without a word."""
    mesh = build_mesh(MeshConfig(), "cpu")
    model = tiny()
    model.config.max_position_embeddings = 16
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ArgumentError, match=r"RoPE of type dynamic(.|\n)*context="):
        shard_batch(enable(model, schedule="ring", mesh=mesh), torch.arange(30))
    whole = enable(model, schedule="ring", mesh=mesh, context=30)
    tokens = torch.arange(30)
    # A document that is packed has the loss that it has in the row alone.
    first = whole(**shard_batch(whole, tokens)).loss
    whole(**shard_batch(whole, tokens[:9]))
    assert whole(**shard_batch(whole, tokens)).loss.item() == first.item()


def test_balanced_looks_at_the_sliding_window_of_the_model() -> None:
    """Guards against work dealt as if every query saw its whole document: with a window all cost alike."""
    model = tiny()
    setattr(
        model, SCHEDULE_ATTRIBUTE, SimpleNamespace(name="of four", rank=0, world=4, layouts=("balanced",))
    )
    runs = []
    for window in (None, 8):
        model.config.sliding_window = window
        batch = shard_batch(model, torch.arange(64))
        runs.append(batch["documents"].shards.runs)
    assert runs == [SequenceShards("balanced", [0, 64], 4, window=window).runs for window in (None, 8)]
    assert runs[0] != runs[1]


def test_a_padded_attention_mask_is_refused() -> None:
    """Guards against padding that other tokens would see: transformers drops the mask without a word."""
    model = alone()
    batch = shard_batch(model, torch.arange(1, 7))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with pytest.raises(ArgumentError, match="takes no padding"):
        model(**batch, attention_mask=mask)
