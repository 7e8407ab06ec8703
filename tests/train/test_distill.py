"""Distillation: the loss against its plain twin, and what training reads of an annotated store."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from longspan.core.errors import ArgumentError
from longspan.kernels.distill import TeacherTopK, linear_distillation, reference_linear_distillation
from longspan.kernels.loss import linear_cross_entropy

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
