"""What far context saves a model."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from longspan.annotate.long_range import LongRangeConfig, measure_long_range
from longspan.core.errors import ConfigError
from longspan.data.store import TokenStore
from longspan.infer.perplexity import token_nll
from longspan.models.hf import load_model


def _losses(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Losses by transformers alone."""
    tensor = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(tensor).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, tensor[0, 1:], reduction="none").numpy()


def test_long_range_is_the_loss_that_far_context_saves(inputs):
    """Guards against other tokens being scored with far context than without, and short documents measured as 0."""
    store = TokenStore(inputs.store)
    config = LongRangeConfig(context=11, scored=3, documents=3)
    losses = partial(token_nll, load_model(inputs.model), batch_tokens=64)
    found = measure_long_range([store, store], losses, config)
    lengths = np.asarray(store.lengths.tokens)
    assert len(found) == 2 * len(store) and np.isfinite(found).sum() == 3
    assert np.isnan(found[np.concatenate([lengths, lengths]) < 11]).all()
    plain = AutoModelForCausalLM.from_pretrained(inputs.model, attn_implementation="eager").eval()
    for document in np.flatnonzero(np.isfinite(found)):
        ids = store.tokens(int(document) % len(store))
        start = (len(ids) - 11) // 2
        far, near = ids[start : start + 11], ids[start + 5 : start + 11]
        wanted = _losses(plain, near)[-3:].mean() - _losses(plain, far)[-3:].mean()
        assert found[document] == pytest.approx(wanted, abs=1e-5)


def test_a_context_without_anything_far_is_refused():
    """Guards against a measure that is 0 by construction."""
    with pytest.raises(ConfigError, match="not longer than twice"):
        LongRangeConfig.from_dict({"context": 1024, "scored": 512})
