"""Models with sinks, latent values, chunks and capped scores: prefix reuse and several ranks against the plain way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from longspan.infer.context_parallel import SpreadModel
from longspan.infer.local import LocalAnswerer
from longspan.infer.memory import cache_bytes_per_token
from longspan.infer.perplexity import token_nll
from longspan.infer.plain import PlainAnswerer
from longspan.infer.requests import Answer, Request
from longspan.parallel.launch import spawn_local
from longspan.parallel.mesh import MeshConfig, build_mesh
from tests.attention_forms import FORMS, eager, with_ours
from tests.flash_operators import calls, flash_operators
from tests.infer.engines import Bytes, assert_same, grid, in_order, random_ids, request
from tests.patience import PATIENCE_SECONDS

PROMPTS = grid([40, 25], [0.0, 0.4, 1.0])


def questions() -> list[Request]:
    return [request(ids, max_new_tokens=11) for ids in PROMPTS]


def measures() -> list[Request]:
    return [request(ids, answer_ids=np.array(random_ids(n, 1 + n))) for n, ids in enumerate(PROMPTS)]


def both(answerer: Any) -> list[Answer]:
    return in_order(answerer.generate(questions())) + in_order(answerer.score(measures()))


@pytest.mark.parametrize("name", FORMS)
def test_prefix_reuse_equals_the_plain_way(name: str) -> None:
    """Chunks count from the first token of a prompt and not of a branch; a sink is one, whatever the parts."""
    assert_prefix_reuse_equals_the_plain_way(name)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "llama4_text", "phimoe"])
def test_prefix_reuse_through_the_cuda_kernel(name: str) -> None:
    """The same of those that its operators take: their parts and log-sum-exps are joined with sinks and chunks."""
    with flash_operators(wide=True):
        assert_prefix_reuse_equals_the_plain_way(name)
        assert calls


def assert_prefix_reuse_equals_the_plain_way(name: str) -> None:
    model = with_ours(eager(name))
    plain = both(PlainAnswerer(model, Bytes(), identity={}, batch_tokens=10_000))  # type: ignore[arg-type]
    for batch_tokens, cache_tokens in ((10_000, None), (7, 60)):
        ours = LocalAnswerer(
            model,
            Bytes(),
            identity={},
            batch_tokens=batch_tokens,
            cache_tokens=cache_tokens,  # type: ignore[arg-type]
        )
        assert_same(both(ours), plain)


def spread(
    rank: int, names: list[str], prefix_reuse: bool
) -> dict[str, tuple[list[Answer], list[np.ndarray]]]:
    mesh, found = build_mesh(MeshConfig(cp_ring=2), "cpu"), {}
    for name in names:
        model = SpreadModel(
            with_ours(eager(name)), Bytes(), mesh=mesh, schedule="ring", identity={},  # type: ignore[arg-type]
            max_length=None, batch_tokens=100, prefix_reuse=prefix_reuse,
        )  # fmt: skip
        answers = dict(model.generate(questions())), dict(model.score(measures()))
        ordered = [part[index] for part in answers for index in sorted(part)]
        found[name] = (ordered, model.token_nll([np.array(ids) for ids in PROMPTS]))
    return found


@pytest.mark.both_kernels
@pytest.mark.slow
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_two_ranks_answer_as_one(prefix_reuse: bool) -> None:
    """Sinks are given their share after the parts of all ranks are joined, chunks find their keys on either."""
    found = spawn_local(spread, 2, list(FORMS), prefix_reuse, timeout_seconds=PATIENCE_SECONDS)[0]
    for name in FORMS:
        model = with_ours(eager(name))
        plain = both(PlainAnswerer(model, Bytes(), identity={}, batch_tokens=10_000))  # type: ignore[arg-type]
        answers, losses = found[name]
        assert_same(answers, plain)
        with torch.no_grad():
            truth = token_nll(model, [np.array(ids) for ids in PROMPTS], batch_tokens=1000)
        for mine, theirs in zip(losses, truth):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_cache_of_latent_attention_is_counted_as_it_is_held() -> None:
    """`head_dim` of such a config is that of its rotated part: a third of what a key takes, and memory ran out."""
    model = with_ours(eager("deepseek_v3"))
    keys = model.model.layers[0].self_attn.kv_b_proj
    heads, width = model.config.num_attention_heads, max(8 + 4, 16)
    assert keys.out_features == heads * (8 + 16)
    assert cache_bytes_per_token(model, upcasts=True) == 2 * 2 * heads * width * 4
