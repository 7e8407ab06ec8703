"""One head for training, answers, perplexity and teachers, against transformers' own logits and loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from longspan.core.errors import ArgumentError
from longspan.infer.perplexity import token_nll
from longspan.infer.plain import teacher_forced
from longspan.infer.teacher import LocalTeacher
from longspan.kernels.distill import TeacherTopK, linear_distillation, reference_linear_distillation
from longspan.kernels.head import Head, predict, top_k
from longspan.kernels.loss import linear_cross_entropy, reference_linear_cross_entropy, reference_logits
from longspan.models.head import output_head
from longspan.models.hf import build_model, hidden_states

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# A scale of 1 or a cap that nothing reaches would hide that it is left out.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {"logits_scaling": 0.3},
    "cohere": {"logit_scale": 3.0},
    "cohere2": {"logit_scale": 0.25},
    "hyperclovax": {"logits_scaling": 3.0},
    "minicpm3": {"dim_model_base": 7, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                 "qk_rope_head_dim": 4, "v_head_dim": 12},
    "gemma2": {"final_logit_softcapping": 0.7, "head_dim": 8, "attn_logit_softcapping": None},
    "gemma3_text": {"final_logit_softcapping": 0.7, "head_dim": 8},
    "nanochat": {"final_logit_softcapping": 1.5},
    "phi": {"partial_rotary_factor": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    built = build_model({"model_type": request.param, **SMALL, **FAMILIES[request.param]}, seed=3).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in built.parameters():
            # Zeros of new biases, and norms of ones, would hide what is not used.
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return built.eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (41,), generator=torch.Generator().manual_seed(0))


def test_loss_and_gradients_are_those_of_transformers(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """A scale, a cap or a bias behind the product that is left out, or left out of the gradient alone."""
    wanted = model(ids[None], labels=ids[None], use_cache=False)
    wanted.loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    labels = torch.cat((ids[1:], torch.tensor([-100])))
    found = linear_cross_entropy(hidden_states(model, ids), output_head(model), labels, chunk_tokens=7)
    (found.loss / 40).backward()
    # transformers' loss takes logits in fp32.
    torch.testing.assert_close(
        found.loss.detach() / 40, wanted.loss.detach(), rtol=1e-6, atol=0, check_dtype=False
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    model.zero_grad()


def test_everyone_reads_the_same_logits(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Five ways from hidden states to probabilities, of which one forgets what the others know."""
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0].double()
    logprobs = torch.log_softmax(logits, -1)
    nll = -logprobs[:-1].gather(1, ids[1:, None])[:, 0]
    row = ids.numpy()
    (windows,) = token_nll(model, [row], batch_tokens=100)
    np.testing.assert_allclose(windows, nll.numpy(), rtol=1e-5)
    answer_nll, likeliest = teacher_forced(model, row[:30], row[30:])
    np.testing.assert_allclose(answer_nll, nll[29:].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(likeliest, logits[29:-1].argmax(-1).numpy())
    found = LocalTeacher(model).topk(row, np.array([0, 41]), k=5)
    np.testing.assert_allclose(found.logprobs, logprobs.topk(5).values.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(found.tail), 1 - np.exp(found.logprobs).sum(1), rtol=1e-3)


HEADS = [
    {"scale": 0.3},
    {"softcap": 0.8},
    {"bias": True},
    {"scale": 2.5, "softcap": 1.3, "bias": True},
]


@pytest.mark.parametrize("change", HEADS)
@pytest.mark.parametrize("taught", [False, True])
def test_chunks_equal_all_logits_at_once(change: dict[str, Any], taught: bool) -> None:
    """The chain rule through cap, scale and bias by hand, against autograd in fp64."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    leaves = [draw(23, 6).requires_grad_(), draw(19, 6).requires_grad_(), draw(19).requires_grad_()]
    hidden, weight, bias = leaves
    head = Head(weight, **{**change, "bias": bias if change.get("bias") else None})
    labels = torch.randint(0, 19, (23,), generator=generator)
    labels[::5] = -100
    weights = torch.rand(23, generator=generator)
    pair: Any = (linear_cross_entropy, reference_linear_cross_entropy)
    more: dict[str, Any] = {"loss_weights": weights}
    if taught:
        pair = (linear_distillation, reference_linear_distillation)
        best = torch.log_softmax(draw(23, 19), 1).topk(3)
        tail = (1 - best.values.exp().sum(1)).log()
        more |= {"teacher": TeacherTopK(best.indices, best.values, tail), "temperature": 2.0}
    wanted = pair[1](hidden, head, labels, **more).loss
    expected = torch.autograd.grad(wanted / 3, leaves, allow_unused=True)
    for chunk in (1, 4, 100):
        found = pair[0](hidden, head, labels, chunk_tokens=chunk, **more).loss
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found / 3, leaves, allow_unused=True), expected)


def test_a_frozen_head_costs_no_gradient_and_a_trained_bias_alone_gets_one() -> None:
    """Gradients are asked for by tensor: one flag for all would lose the bias's, or pay for the matrix's."""
    hidden, weight = torch.randn(9, 4).requires_grad_(), torch.randn(7, 4)
    bias = torch.zeros(7, requires_grad=True)
    linear_cross_entropy(hidden, Head(weight, bias, 2.0), torch.arange(9) % 7).loss.backward()
    assert bias.grad is not None and bias.grad.any() and weight.grad is None


def test_predictions_and_top_k_of_many_rows_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows past the first chunk that are lost, or laid out in another order."""
    monkeypatch.setattr("longspan.kernels.head.LOGITS_BUDGET_BYTES", 1)
    head = Head(torch.randn(13, 5), torch.randn(13), 0.5, 2.0)
    hidden, targets = torch.randn(70, 5), torch.arange(70) % 13
    logits = reference_logits(hidden, head)
    found = predict(head, hidden, targets)
    torch.testing.assert_close(
        found.nll, torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    )
    torch.testing.assert_close((found.highest, found.ids), tuple(logits.max(1)))
    _, logprobs, _ = top_k(head, hidden, 4)
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, 1).topk(4).values)
    assert predict(head, hidden[:0]).ids.shape == (0,)


@pytest.mark.parametrize(
    ("family", "fields", "word"),
    [
        ("modernbert-decoder", {}, "lm_head"),
        ("roberta", {"is_decoder": True}, "lm_head"),
    ],
)
def test_layers_before_the_output_embedding_are_refused(
    family: str, fields: dict[str, Any], word: str
) -> None:
    """A dense layer and a norm between hidden states and output embedding would be skipped without a word."""
    from transformers import AutoConfig, AutoModelForCausalLM

    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **fields))
    with pytest.raises(ArgumentError, match=word):
        output_head(built)
