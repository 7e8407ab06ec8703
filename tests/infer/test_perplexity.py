from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from longspan.core.errors import ArgumentError
from longspan.infer.perplexity import token_nll
from longspan.models.hf import build_model
from tests.infer.engines import MODELS, model_of, random_ids


def windows_of(sizes: list[int]) -> list[np.ndarray]:
    return [np.random.default_rng(size).integers(0, 97, size=size).astype(np.uint32) for size in sizes]


def brute_force(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        log_probs = torch.log_softmax(model(tensor[None]).logits[0].double(), dim=-1)
    return -log_probs[:-1].gather(1, tensor[1:, None])[:, 0].numpy()


@pytest.mark.both_kernels
@pytest.mark.parametrize("batch_tokens", [1, 70, 10_000])
def test_token_losses_equal_brute_force(twins: Any, batch_tokens: int) -> None:
    """Whole logits of the library's model, a window at a time, in every way of batching."""
    windows = windows_of([2, 33, 64, 150, 33])
    for ids, nll in zip(windows, token_nll(twins.ours, windows, batch_tokens=batch_tokens)):
        expected = brute_force(twins.plain, ids)
        assert nll.shape == expected.shape == (len(ids) - 1,)
        assert nll.dtype == np.float32
        assert nll.sum(dtype=np.float64) == pytest.approx(expected.sum(), rel=1e-6)
        np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.both_kernels
def test_windows_do_not_see_each_other(twins: Any) -> None:
    """Another window in the same row must not change a loss, nor supply the label of the last token."""
    first, second, other = windows_of([40, 41, 42])
    together = token_nll(twins.ours, [first, second], batch_tokens=1000)
    exchanged = token_nll(twins.ours, [first, other], batch_tokens=1000)
    np.testing.assert_allclose(together[0], exchanged[0], rtol=1e-5, atol=1e-6)


def test_window_without_anything_to_predict_is_refused(twins: Any) -> None:
    """One token has no loss; a mean over it would be a division by zero."""
    with pytest.raises(ArgumentError, match="window 1 has nothing to predict"):
        token_nll(twins.ours, [*windows_of([5]), np.array([3], dtype=np.uint32)], batch_tokens=10)
    assert token_nll(twins.ours, [], batch_tokens=10) == []


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_each_window_has_the_frequencies_of_its_own_length(name: str, batch_tokens: int) -> None:
    """transformers takes the longest window of a pass, and dynamic NTK keeps that of an earlier pass."""
    windows = [np.array(random_ids(seed, size)) for seed, size in enumerate([100, 30, 10, 30])]
    for ids, nll in zip(windows, token_nll(model_of(name), windows, batch_tokens=batch_tokens)):
        fresh = build_model(MODELS[name], seed=3).eval()
        np.testing.assert_allclose(nll, brute_force(fresh, ids), rtol=1e-4, atol=1e-5)
