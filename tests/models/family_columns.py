"""What else works with a family whose packed rows are right: each a column of docs/models.md.

    apart      other words in one document change nothing in the next
    chunks     the row walked in chunks (memory.chunk_tokens) has its loss and every gradient
    prefix     answers behind a shared prefix have the losses of prompts that are read alone
    LoRA       an adapter comes back from its folder, and merged into a model that transformers reads
    export     the exported folder is the same model to transformers
    ring, ulysses   two ranks that share a row have its loss and every gradient

A column is "yes", a refusal with its reason, or wrong: there must be none of these.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.core.errors import UserError
from longspan.infer.local import LocalAnswerer
from longspan.infer.plain import PlainAnswerer
from longspan.infer.requests import Request
from longspan.kernels.loss import IGNORE_LABEL
from longspan.models.documents import Documents
from longspan.models.export import export_model
from longspan.models.hf import enable, hidden_states, load_model, save_model
from longspan.models.lora import LoraConfig, apply_lora, save_adapter
from longspan.parallel.launch import spawn_local
from longspan.parallel.mesh import MeshConfig, build_mesh
from longspan.parallel.schedules import ScheduleName, build_schedule
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.parallel.shards import SequenceShards
from longspan.train.batch import Batch, take
from longspan.train.objectives import ModelWithLoss
from longspan.train.recurrent import recurrent_step
from tests.infer.engines import Bytes
from tests.models.family_survey import FIELDS, LENGTHS, Finding, built, line, quiet, shrunk
from tests.patience import PATIENCE_SECONDS

YES = Finding("yes", "")
CHUNK = 12
MOST_CHARACTERS = 160
PER_WORLD = 16
RANKED: dict[ScheduleName, MeshConfig] = {"ring": MeshConfig(cp_ring=2), "ulysses": MeshConfig(cp_ulysses=2)}


def small_model(family: str) -> Any:
    """Return a family's small model with longspan's attention, with windows where it can have some."""
    config = AutoConfig.for_model(family, **FIELDS.get(family, {}))
    try:
        model = built(shrunk(copy.deepcopy(config), windows=True))
        enable(model)
        hidden_states(model, row_of(2).input_ids)
    except Exception:  # noqa: BLE001
        # As the survey does: a family that knows no windows is looked at without.
        model = enable(built(shrunk(config, windows=False)))
    return model


def row_of(documents: int) -> Batch:
    """Return the row of the survey as a batch, or its first document."""
    ids = (torch.arange(3, 3 + sum(LENGTHS)) % 60 + 1)[: sum(LENGTHS[:documents])]
    table = Documents.from_cu_seqlens(np.cumsum([0, *LENGTHS[:documents]]).tolist())
    labels = ids.roll(-1)
    labels[torch.from_numpy(table.cu_seqlens[1:] - 1)] = IGNORE_LABEL
    zeros = torch.zeros(len(ids), dtype=torch.long)
    return Batch(ids, labels, None, table.positions(), zeros, ("text",), table)


def apart(model: Any) -> Finding:
    """Look whether a document sees the one before."""
    row = row_of(2)
    other = row.input_ids.clone()
    other[: LENGTHS[0]] = other[: LENGTHS[0]].flip(0)
    with torch.no_grad():
        one, two = (hidden_states(model, ids, row.documents) for ids in (row.input_ids, other))
    same = float((one - two)[LENGTHS[0] :].abs().max())
    changed = float((one - two)[: LENGTHS[0]].abs().max())
    largest = float(one.abs().max())
    # Experts add up their tokens in another order.
    return YES if same <= 1e-6 * largest < changed else Finding("wrong", f"off by {same:.1e}")


def chunks(model: Any) -> Finding:
    """Look whether a row walked in chunks trains as at once."""
    row = row_of(2)
    expected = _trained(model, row)
    model.zero_grad(set_to_none=True)
    loss = recurrent_step(model, row, chunk_tokens=CHUNK, weight=1.0).loss
    return _compare(float(loss), _gradients(model), *expected)


def prefix(model: Any) -> Finding:
    """Look whether answers behind a shared prefix are those of prompts that are read alone."""
    ids = row_of(2).input_ids.numpy()
    asked = [
        Request("", np.concatenate((ids[:cut], ids[-3:])), answer_ids=ids[4 : 4 + length])
        for cut, length in ((20, 3), (20, 5), (13, 2), (25, 4))
    ]
    plain = PlainAnswerer(model, Bytes(), identity={}, max_length=None, batch_tokens=1000)  # type: ignore[arg-type]
    ours = LocalAnswerer(model, Bytes(), identity={}, max_length=None, batch_tokens=7, cache_tokens=60)  # type: ignore[arg-type]
    expected, found = dict(plain.score(asked)), dict(ours.score(asked))
    worst = max(_apart(found[i].nll, expected[i].nll) for i in range(len(asked)))
    return YES if worst <= 2e-3 else Finding("wrong", f"losses are off by {worst:.1e}")


def lora(model: Any) -> Finding:
    """Look whether an adapter is trained, comes back, and is merged into what transformers reads."""
    row = row_of(1)
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, merged = (Path(folder, name) for name in ("base", "adapter", "merged"))
        save_model(model, base)
        adapted = apply_lora(load_model(base), LoraConfig(rank=2), seed=0)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        _trained(adapted, row)
        moved = [weight for weight in adapted.parameters() if weight.grad is not None and weight.grad.any()]
        if not moved:
            return Finding("wrong", "no adapter has a gradient")
        expected = _logits(adapted, row)
        save_adapter(adapted, adapter, base=base)
        again = _logits(load_model(adapter), row)
        if not torch.equal(again, expected):
            return Finding("wrong", f"reloaded, logits are off by {_distance(again, expected):.1e}")
        export_model(load_model(adapter), merged)
        return _as_transformers_reads(merged, expected)


def export(model: Any) -> Finding:
    """Look whether transformers reads the exported folder as the same model."""
    row = row_of(1)
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder, "base"), Path(folder, "out")
        save_model(model, base)
        loaded = load_model(base)
        expected = _logits(model, row)
        if (distance := _distance(_logits(loaded, row), expected)) > 1e-5:
            return Finding("wrong", f"reloaded, logits are off by {distance:.1e}")
        export_model(loaded, out)
        return _as_transformers_reads(out, expected)


ALONE: dict[str, Callable[[Any], Finding]] = {
    "apart": apart,
    "chunks": chunks,
    "prefix": prefix,
    "LoRA": lora,
    "export": export,
}
COLUMNS = (*ALONE, *RANKED)


def columns_alone(family: str, names: Iterable[str] = tuple(ALONE)) -> dict[str, Finding]:
    """Return the columns that one process can look at."""
    with quiet():
        return {name: _safely(ALONE[name], small_model(family)) for name in names}


def columns_of_two(rank: int, families: Iterable[str]) -> dict[str, dict[str, Finding]]:
    """Return the columns of two ranks; both call it."""
    schedules = {}
    for name, degrees in RANKED.items():
        mesh = build_mesh(degrees, "cpu")
        schedules[name] = build_schedule(name, ring_group=mesh.ring_group, ulysses_group=mesh.ulysses_group)
    torch.set_num_threads(1)
    found = {}
    with quiet():
        for family in families:
            model = small_model(family)
            expected = _trained(model, row_of(2))
            found[family] = {
                name: _safely(partial(_of_two, schedule=schedule, expected=expected), model)
                for name, schedule in schedules.items()
            }
    return found


def all_columns(names: Iterable[str]) -> dict[str, dict[str, Finding]]:
    """Return every column of some families; starts two processes."""
    names = list(names)
    found = {family: columns_alone(family) for family in names}
    for start in range(0, len(names), PER_WORLD):
        part = names[start : start + PER_WORLD]
        ranks = spawn_local(columns_of_two, 2, part, timeout_seconds=PER_WORLD * PATIENCE_SECONDS)
        for family, columns in ranks[0].items():
            found[family] |= columns
    return found


def _of_two(model: Any, schedule: Any, expected: tuple[float, dict[str, torch.Tensor]]) -> Finding:
    row = row_of(2)
    assert isinstance(row.documents, Documents)
    shards = SequenceShards(schedule.layouts[0], row.documents.cu_seqlens, 2)
    model.zero_grad(set_to_none=True)
    part = ModelWithLoss(model)(take(row, ShardedDocuments(shards, schedule)))
    part.loss.backward()
    total = part.loss.detach().clone()
    dist.all_reduce(total)
    mine = _gradients(model)
    for name, weight in model.named_parameters():
        whole = mine.get(name, torch.zeros_like(weight))
        dist.all_reduce(whole)
        mine[name] = whole
    return _compare(float(total), mine, *expected)


def _safely(check: Callable[[Any], Finding], model: Any) -> Finding:
    try:
        return check(model)
    except UserError as error:
        # Without the folder, which has another name each time.
        return Finding("refused", re.sub(r"/\S*/tmp\w+/", "", line(error))[:MOST_CHARACTERS])
    except Exception as error:  # noqa: BLE001
        return Finding("wrong", line(error))


def _trained(model: Any, row: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = ModelWithLoss(model)(row).loss
    loss.backward()
    return loss.item(), _gradients(model)


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def _compare(
    loss: float,
    found: dict[str, torch.Tensor],
    expected_loss: float,
    expected: dict[str, torch.Tensor],
) -> Finding:
    if not abs(loss - expected_loss) <= 1e-4 * abs(expected_loss):
        return Finding("wrong", f"the loss is {loss}, not {expected_loss}")
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name in found | expected:
        one, two = (each.get(name, torch.zeros(())) for each in (found, expected))
        error = float((one - two).norm())
        if not error <= 1e-3 * (float(two.norm()) + 1e-3 * largest):
            return Finding("wrong", f"the gradient of {name} is off by {error:.1e}")
    return YES


def _logits(model: Any, row: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=row.input_ids[None], use_cache=False).logits[0].float()


def _apart(one: np.ndarray | None, two: np.ndarray | None) -> float:
    assert one is not None and two is not None
    return float(np.abs(one - two).max())


def _distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def _as_transformers_reads(folder: Path, expected: torch.Tensor) -> Finding:
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    distance = _distance(_logits(theirs, row_of(1)), expected)
    return YES if distance < 1e-3 else Finding("wrong", f"exported, logits are off by {distance:.1e}")
