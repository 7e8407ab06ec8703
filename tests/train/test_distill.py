"""Distillation: the loss against its plain twin, and what training reads of an annotated store."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from longspan.annotate.config import AnnotateConfig
from longspan.annotate.run import annotate
from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.records import read_jsonl
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import PackPlan, plan_packing
from longspan.data.rows.annotations import Annotations, TaughtRows
from longspan.data.rows.loader import PackedRow, RowLoader, TeacherRow
from longspan.data.store import TokenStore
from longspan.infer.perplexity import token_nll
from longspan.kernels.distill import TeacherTopK, linear_distillation, reference_linear_distillation
from longspan.kernels.loss import linear_cross_entropy
from longspan.models.head import output_head
from longspan.models.hf import build_model, hidden_states, load_model
from longspan.parallel.sharded_documents import ShardedDocuments
from longspan.parallel.shards import SequenceShards
from longspan.train.batch import collate, take
from longspan.train.config import TrainConfig
from longspan.train.loop_config import DistillConfig
from longspan.train.objectives import ModelWithLoss, distill
from longspan.train.recurrent import recurrent_step
from longspan.train.trainer import train
from tests.train.conftest import recipe

V, D = 23, 7


def make_teacher(tokens: int, k: int, seed: int, *, ragged: bool = False, holes: bool = False) -> TeacherTopK:
    """A random teacher; `ragged` rows know fewer than k words, `holes` leaves every third token without one."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(tokens, V, generator=generator, dtype=torch.float64).mul(2).log_softmax(1)
    top, ids = logprobs.topk(k, 1)
    if ragged:
        count = torch.randint(1, k + 1, (tokens, 1), generator=generator)
        top = top.masked_fill(torch.arange(k) >= count, -torch.inf)
    tail = torch.log1p(-top.exp().sum(1).clamp(max=1.0)) if k < V else torch.full((tokens,), -torch.inf)
    if holes:
        top[::3], tail[::3] = -torch.inf, 0.0
    return TeacherTopK(ids, top, tail)


def make_inputs(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, D, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, V, (tokens,), generator=generator)
    labels[1::4] = -100
    return hidden, weight, labels, torch.rand(tokens, generator=generator, dtype=torch.float64)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    k=st.sampled_from([1, 5, V]),
    distill_weight=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([1.0, 2.5]),
    ragged=st.booleans(),
    holes=st.booleans(),
    chunk_tokens=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 1000),
)
def test_equals_its_plain_twin(k, distill_weight, temperature, ragged, holes, chunk_tokens, seed):
    """A sign, a factor of the temperature or a word counted twice in the gradient written by hand."""
    hidden, weight, labels, loss_weights = make_inputs(11, seed)
    teacher = make_teacher(11, k, seed + 1, ragged=ragged, holes=holes)
    settings = {
        "distill_weight": distill_weight,
        "temperature": temperature,
        "loss_weights": loss_weights,
        "chunk_tokens": chunk_tokens,
    }
    found, wanted = [], []
    for function, into in ((linear_distillation, found), (reference_linear_distillation, wanted)):
        hidden.grad = weight.grad = None
        result = function(hidden, weight, labels, teacher, **settings)
        result.loss.backward()
        into += [
            result.loss.detach(),
            result.per_token_nll,
            result.per_token_kl,
            hidden.grad.clone(),
            weight.grad.clone(),
        ]
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_gradients_are_those_of_the_loss():
    """Both twins could share a mistake: numerical derivatives in fp64 do not."""
    hidden, weight, labels, loss_weights = make_inputs(5, 3)
    teacher = make_teacher(5, 4, 4)

    def loss() -> torch.Tensor:
        return linear_distillation(
            hidden, weight, labels, teacher, distill_weight=0.6, temperature=1.7, loss_weights=loss_weights
        ).loss

    loss().backward()
    step = 1e-6
    for values in (hidden, weight):
        flat, grad = values.detach().reshape(-1), values.grad.reshape(-1)
        for place in range(0, len(flat), 5):
            before = flat[place].item()
            slopes = []
            for sign in (1, -1):
                flat[place] = before + sign * step
                slopes.append(sign * loss().item() / (2 * step))
            flat[place] = before
            assert sum(slopes) == pytest.approx(grad[place].item(), rel=1e-5, abs=1e-8)


def test_by_hand():
    """Student uniform over 4 words, teacher 1/2 on word 0 and 1/2 on the rest: KL = 1/2 ln 2 + 1/2 ln 2/3."""
    hidden, weight = torch.zeros(1, 2), torch.zeros(4, 2)
    half = math.log(0.5)
    teacher = TeacherTopK(torch.tensor([[0]]), torch.tensor([[half]]), torch.tensor([half]))
    result = linear_distillation(hidden, weight, torch.tensor([3]), teacher, distill_weight=0.25)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert result.per_token_kl.item() == pytest.approx(kl)
    assert result.loss.item() == pytest.approx(0.25 * kl + 0.75 * math.log(4))


def test_a_student_like_its_teacher_has_no_divergence():
    """The tail must be the mass of all other words: forgetting one shows here."""
    hidden, weight, labels, _ = make_inputs(6, 8)
    logprobs = (hidden @ weight.T).detach().log_softmax(1)
    top, ids = logprobs.topk(3, 1)
    teacher = TeacherTopK(ids, top, torch.log1p(-top.exp().sum(1)))
    result = linear_distillation(hidden, weight, labels, teacher, distill_weight=1.0, temperature=2.0)
    assert result.per_token_kl.abs().max() < 1e-12
    result.loss.backward()
    assert hidden.grad.abs().max() < 1e-12


def test_weight_nought_is_the_language_model():
    """Tokens without a teacher, and a share of 0, have exactly the loss of lm."""
    hidden, weight, labels, loss_weights = make_inputs(9, 2)
    plain = linear_cross_entropy(hidden, weight, labels, loss_weights=loss_weights)
    nobody = TeacherTopK(torch.zeros(9, 2, dtype=torch.int32), torch.full((9, 2), -torch.inf), torch.zeros(9))
    for teacher, share in ((make_teacher(9, 3, 1), 0.0), (nobody, 0.9)):
        result = linear_distillation(
            hidden, weight, labels, teacher, distill_weight=share, loss_weights=loss_weights
        )
        torch.testing.assert_close(result.loss, plain.loss)
        torch.testing.assert_close(result.per_token_nll, plain.per_token_nll)


def test_stays_finite_where_the_student_is_sure():
    """A tail whose mass underflows must give neither inf nor nan."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[400.0], [0.0], [0.0]], requires_grad=True)
    teacher = TeacherTopK(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]), torch.tensor([math.log(0.5)]))
    result = linear_distillation(hidden, weight, torch.tensor([1]), teacher)
    result.loss.backward()
    assert (
        torch.isfinite(result.loss)
        and torch.isfinite(hidden.grad).all()
        and torch.isfinite(weight.grad).all()
    )


def test_no_label_is_no_loss():
    hidden, weight, labels, _ = make_inputs(4, 1)
    result = linear_distillation(hidden, weight, torch.full_like(labels, -100), make_teacher(4, 2, 0))
    assert result.loss == 0


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t: t._replace(ids=t.ids + 20), {}, "words that the student does not"),
        (lambda t: t._replace(tail=t.tail[:2]), {}, "a teacher has ids"),
        (lambda t: t, {"distill_weight": 1.5}, "is a share"),
        (lambda t: t, {"temperature": 0.0}, "above 0"),
    ],
)
def test_refuses(change, settings, message):
    hidden, weight, labels, _ = make_inputs(4, 1)
    with pytest.raises(ArgumentError, match=message):
        linear_distillation(hidden, weight, labels, change(make_teacher(4, 3, 0)), **settings)


# What training reads and does.


@pytest.fixture(scope="module")
def taught(data_root, tmp_path_factory):
    """A teacher that was trained for some steps, a plan of rows of 48 tokens, and what it predicts for them."""
    root = tmp_path_factory.mktemp("taught")
    for name in ("plain", "weighted", "tokenizer"):
        (root / name).symlink_to(data_root / name)
    store = TokenStore(root / "plain")
    plan = plan_packing(PackConfig(length=CONTEXT), store.lengths, np.arange(len(store), dtype=np.uint32), 0)
    plan.save(root / "plan", stores=[root / "plain"])
    train(TrainConfig.from_dict(lm_recipe(), where="test"), root / "run", data_root=root)
    shutil.copytree(root / "run" / "stages" / "only", root / "teacher")
    spec = {"teacher": {"model": str(root / "teacher")}, "data": str(root / "plan"), "k": 8}
    annotate(AnnotateConfig.from_dict(spec, where="test"), root / "annotations")
    return root


CONTEXT = 48


def lm_recipe(**stage: Any) -> dict[str, Any]:
    values = recipe()
    only = {
        **values["stages"][0],
        "name": "only",
        "context_length": CONTEXT,
        "tokens": None,
        "steps": 40,
        "batch_tokens": 8 * CONTEXT,
        "micro_batch_tokens": 3 * CONTEXT,
        "max_epochs": 100,
        "streams": {"text": {"rows": "plan"}},
        **stage,
    }
    return {**values, "stages": [{name: value for name, value in only.items() if value is not None}]}


def distill_recipe(teacher: str = "annotations", **stage: Any) -> dict[str, Any]:
    streams = {"text": {"rows": "plan", "teacher": teacher}}
    return {**lm_recipe(**{"objective": "distill", "streams": streams, **stage}), "seed": 11}


def far_loss(model: Any, root: Path) -> float:
    """Return nats a token in the second half of the context."""
    loader = RowLoader([TokenStore(root / "plain")], PackPlan.load(root / "plan"))
    windows = [loader.row(index).input_ids for index in range(12)]
    losses = token_nll(model, windows, batch_tokens=1024)
    return float(np.mean([nll[CONTEXT // 2 :].mean() for nll in losses]))


def test_a_student_learns_from_a_teacher(taught, tmp_path):
    """From a trained teacher through its annotations to a student: the divergence falls, and so does the loss of
    tokens in the second half of the context."""
    config = TrainConfig.from_dict(distill_recipe(distill={"weight": 0.9, "temperature": 1.5}), where="test")
    result = train(config, tmp_path / "run", data_root=taught)
    steps = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert len(steps) == 40 and all(step["kl"] is not None for step in steps)
    first, last = (np.mean([step["kl"] for step in part]) for part in (steps[:3], steps[-3:]))
    assert last < 0.3 * first
    start = build_model(config.model.hf_config, seed=config.seed, rope=config.stages[0].rope)
    assert far_loss(load_model(result.models["only"]), taught) < 0.7 * far_loss(start, taught)


def test_share_nought_trains_as_lm(taught, tmp_path):
    """The same losses as without a teacher: rows, weights and the sum over a step are untouched."""
    losses = []
    for name, values in (
        ("lm", {**lm_recipe(steps=4), "seed": 11}),
        ("distill", distill_recipe(steps=4, distill={"weight": 0.0})),
    ):
        train(TrainConfig.from_dict(values, where="test"), tmp_path / name, data_root=taught)
        losses.append([step["loss"] for step in read_jsonl(tmp_path / name / "metrics.jsonl")])
    np.testing.assert_allclose(*losses, rtol=1e-6)


def rows_of(taught: Path, count: int = 4) -> list[PackedRow]:
    store = TokenStore(taught / "plain")
    loader = RowLoader([store], PackPlan.load(taught / "plan"))
    rows = TaughtRows(loader, [Annotations(taught / "annotations")], stores=[store])
    return [rows.row(index) for index in range(count)]


def test_the_loss_of_a_step_does_not_depend_on_micro_batches(taught):
    """Rows with fewer words than others, and one without a teacher, in any grouping."""
    rows = rows_of(taught)
    rows[1] = rows[1]._replace(teacher=None)
    rows[2] = rows[2]._replace(teacher=TeacherRow(*(c[:, :3] if c.ndim == 2 else c for c in rows[2].teacher)))
    model = ModelWithLoss(load_model(taught / "teacher"), partial(distill, how=DistillConfig(weight=0.7)))
    whole = model(collate(rows))
    parts = [model(collate(rows[start:end])) for start, end in ((0, 1), (1, 2), (2, 4))]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    apart = [torch.zeros(CONTEXT) if part.per_token_kl is None else part.per_token_kl for part in parts]
    torch.testing.assert_close(torch.cat(apart), whole.per_token_kl)


def test_ranks_that_share_a_row_read_their_own_columns(taught):
    """Labels and teacher taken by other indices would pair a token with the prediction after another."""
    rows = rows_of(taught, 2)
    whole = collate(rows)
    model = ModelWithLoss(load_model(taught / "teacher"), partial(distill, how=DistillConfig(weight=1.0)))
    with torch.no_grad():
        wanted = model(whole)
        head = output_head(model.model)
        hidden = hidden_states(model.model, whole.input_ids, whole.documents)
        total, kl = 0.0, torch.zeros(len(whole.labels) + 8)
        for layout in ("zigzag", "striped"):
            shards = SequenceShards(layout, whole.documents.cu_seqlens, 3)
            for rank in range(3):
                # Only `indices` and `take` of the table are asked for, so no other process is needed.
                table = ShardedDocuments.__new__(ShardedDocuments)
                table.shards, table.schedule = shards, SimpleNamespace(rank=rank)
                part = take(whole, table)
                found = distill(part, table.take(hidden, padding=0.0), head, DistillConfig(weight=1.0))
                total += float(found.loss) / 2
                kl[torch.from_numpy(table.indices)] = found.per_token_kl
            torch.testing.assert_close(kl[: len(whole.labels)], wanted.per_token_kl)
    assert total == pytest.approx(float(wanted.loss), rel=1e-5)


def test_chunks_of_a_row_have_the_same_gradient(taught):
    """memory.chunk_tokens walks rows in pieces: each has its own part of the teacher's columns."""
    batch = collate(rows_of(taught, 2))
    grads, losses = [], []
    for chunk in (None, 20):
        model = ModelWithLoss(load_model(taught / "teacher"), partial(distill, how=DistillConfig(weight=0.5)))
        if chunk is None:
            result = model(batch)
            (result.loss / 7).backward()
        else:
            result = recurrent_step(model, batch, chunk_tokens=chunk, weight=7.0)
        losses.append((result.loss.detach(), result.per_token_nll, result.per_token_kl))
        grads.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip((*losses[0], *grads[0]), (*losses[1], *grads[1])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_store_annotated_by_document(taught, tmp_path):
    """A stream that is planned by the recipe takes annotations of the store's documents."""
    spec = {
        "teacher": {"model": str(taught / "teacher"), "context": 512},
        "data": str(taught / "plain"),
        "k": 5,
    }
    annotate(AnnotateConfig.from_dict(spec, where="test"), taught / "by-document")
    streams = {"text": {"store": "plain", "teacher": "by-document"}}
    config = TrainConfig.from_dict(distill_recipe(steps=2, streams=streams), where="test")
    train(config, tmp_path / "run", data_root=taught)
    assert all(step["kl"] > 0 for step in read_jsonl(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"streams": {"text": {"rows": "plan"}}}, "needs the teacher of every stream"),
        ({"objective": "lm"}, "has no effect with objective lm"),
        (
            {"objective": "lm", "streams": {"text": {"rows": "plan"}}, "distill": {"weight": 1}},
            "has no effect",
        ),
        ({"distill": {"weight": 2}}, "distill.weight"),
        (
            {"streams": {"text": {"records": ["a.jsonl"], "teacher": "annotations"}}},
            "make a store of the records",
        ),
    ],
)
def test_refuses_a_recipe(stage, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(distill_recipe(**stage), where="test")


def test_refuses_annotations_of_other_rows(taught, tmp_path):
    streams = {"text": {"store": "weighted", "teacher": "annotations"}}
    config = TrainConfig.from_dict(distill_recipe(streams=streams), where="test")
    with pytest.raises(DataError, match="annotated for other rows"):
        train(config, tmp_path / "run", data_root=taught)
    assert not (tmp_path / "run").exists()
