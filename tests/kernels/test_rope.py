"""RoPE parameter dictionaries, and the frequencies they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from longspan.core.errors import ConfigError
from longspan.kernels import rope
from longspan.kernels.longrope import LongRopeSearch, search_factors, starting_factors


def test_ntk_slows_the_lowest_frequency_by_the_factor_and_keeps_the_highest() -> None:
    """A wrong exponent (d/2, or d-2 over d) still looks plausible; the two ends decide."""
    before = rope.inv_freq(rope.default(1e4), head_dim=64).double()
    after = rope.inv_freq(rope.ntk(8.0, theta=1e4, head_dim=64), head_dim=64).double()
    assert after[0] == before[0] == 1.0
    assert (before[-1] / after[-1]).item() == pytest.approx(8.0, rel=1e-6)
    assert rope.ntk_theta(8.0, theta=1e4, head_dim=32) == pytest.approx(9.19e4, rel=1e-3)


def test_linear_divides_every_frequency() -> None:
    """Position interpolation by 4 is the same as positions / 4."""
    plain, scaled = (rope.inv_freq(p, head_dim=8) for p in (rope.default(1e4), rope.linear(4, theta=1e4)))
    torch.testing.assert_close(scaled * 4, plain)


def test_frequencies_are_rounded_once_from_fp64() -> None:
    """fp32 powers put the angle at position 500,000 off by 0.01; the frequencies must be the nearest fp32."""
    found = rope.inv_freq(rope.default(8e6), head_dim=128)
    exact = 8e6 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert found.dtype == torch.float32 and torch.equal(found, exact.float())
    assert rope.inv_freq({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, head_dim=64).shape == (16,)


def test_hash_tells_settings_apart_and_ignores_the_last_bit() -> None:
    """The hash must not depend on the machine's pow, and must change with theta, factor and cos scaling."""
    base = rope.inv_freq(rope.default(1e4), head_dim=64)
    name = rope.inv_freq_hash(base)
    assert len(name) == 16
    assert rope.inv_freq_hash(base[1:]) != name and rope.inv_freq_hash(base, attention_scaling=1.1) != name
    assert rope.inv_freq_hash(rope.inv_freq(rope.default(10001.0), head_dim=64)) != name
    assert rope.inv_freq_hash(torch.tensor([0.5, 0.25])) == rope.inv_freq_hash(
        torch.tensor([0.5, 0.25 * (1 + 1e-7)])
    )


def test_types_of_transformers_pass_through() -> None:
    """Checked, copied, not touched."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 4096}
    found = rope.rope_parameters(yarn)
    assert found == yarn and found is not yarn


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "yam", "rope_theta": 1e4}, "unknown rope_type"),
        ({"rope_type": "default"}, "lacks rope_theta"),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "original_max_position_embeddings"),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 32}, "has no beta_fast"),
        ({"rope_type": "linear", "factor": 0.5, "rope_theta": 1e4}, "factor is out of range"),
        ({"rope_theta": -1}, "rope_theta is out of range"),
        ({"rope_theta": "1e4"}, "rope_theta is out of range"),
        ({"rope_type": "ntk", "factor": 2.0, "rope_theta": 1e4}, "head dimension"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "rope_theta": 5e5,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
            },
            "larger than low_freq_factor",
        ),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], message: str) -> None:
    """transformers only warns about most of these and trains on."""
    with pytest.raises(ConfigError, match=message):
        rope.rope_parameters(settings)
    with pytest.raises(ConfigError, match="computed by transformers"):
        rope.inv_freq({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, head_dim=8)


def longrope_settings(length: int) -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * length,
        "long_factor": [1.0] * length,
    }


def test_factors_reach_the_context_or_are_refused() -> None:
    """transformers trains on with a factor of 2 for a context of 4 times the length."""
    for kind in ("linear", "ntk", "dynamic", "yarn"):
        settings = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
        if kind == "yarn":
            settings["original_max_position_embeddings"] = 64
        rope.check_reach(settings, own_context=64, context=256)
        rope.check_reach(settings, own_context=64, context=100)
        with pytest.raises(ConfigError, match="does not match the context length"):
            rope.check_reach(settings, own_context=64, context=257)
    rope.check_reach(rope.default(1e6), own_context=64, context=1 << 20)
    rope.check_reach(longrope_settings(8), own_context=64, context=256)
    rope.rope_parameters(longrope_settings(8) | {"rope_theta": 1e4}, head_dim=16)
    with pytest.raises(ConfigError, match="number for each pair"):
        rope.rope_parameters(longrope_settings(7) | {"rope_theta": 1e4}, head_dim=16)


def test_yarn_may_count_from_less_than_the_models_positions() -> None:
    """Qwen3's own YaRN, 4 times 32,768 on a model of 40,960, was refused; a factor too small for it was not."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32768}
    rope.check_reach(yarn, own_context=40960, context=131072)
    with pytest.raises(ConfigError, match=r"factor 4 x 32768 of the model = 131072 positions, 163840"):
        rope.check_reach(yarn, own_context=40960, context=163840)
    with pytest.raises(ConfigError, match="is not the context of the model"):
        rope.check_reach(yarn, own_context=16384, context=131072)


def test_longrope_without_a_factor_reaches_as_far_as_its_slowest_pair() -> None:
    """Published models leave the factor out: a KeyError, or a stage of any length let through."""
    settings = longrope_settings(8) | {"long_factor": [1.0] * 7 + [6.0]}
    del settings["factor"]
    rope.check_reach(settings, own_context=64, context=384)
    with pytest.raises(ConfigError, match="does not match the context length"):
        rope.check_reach(settings, own_context=64, context=385)


def test_longrope_search_finds_factors_that_no_known_method_has() -> None:
    """A search that only returns one of its starting points is none; the factors rise and keep to their bounds."""
    wanted = np.array([1.0, 1.0, 1.5, 1.5, 3.0, 6.0, 8.0, 8.0])

    def score(factors: Sequence[float]) -> float:
        return float(np.square(np.log(np.array(factors) / wanted)).sum())

    found = search_factors(
        score, theta=1e4, head_dim=16, own_context=64, context=512,
        search=LongRopeSearch(16, 8, 8, 25), seed=1,
    )  # fmt: skip
    assert found.score < 0.2 * min(found.started_at.values())
    assert found.history == sorted(found.history, reverse=True)
    assert found.factors == sorted(found.factors) and found.factors[0] >= 1 and found.factors[-1] <= 10
    assert found.evaluations <= 16 + 25 * 16
    settings = found.rope(theta=1e4, own_context=64, context=512)
    assert rope.rope_parameters(settings) == settings
    rope.check_reach(settings, own_context=64, context=512)
    again = search_factors(
        score, theta=1e4, head_dim=16, own_context=64, context=512,
        search=LongRopeSearch(16, 8, 8, 25), seed=1,
    )  # fmt: skip
    assert again == found


def test_longrope_candidates_that_overflow_never_win() -> None:
    """NaN compares false with everything and would stay where it stands."""
    found = search_factors(
        lambda factors: float("nan") if factors[-1] < 8 else factors[-1],
        theta=1e4, head_dim=8, own_context=64, context=512, search=LongRopeSearch(8, 4, 4, 3),
    )  # fmt: skip
    assert 8 <= found.score < 11


def test_longrope_starts_with_what_is_known() -> None:
    """Formulas of the three methods, at their ends: fast pairs stay, slow ones are interpolated by the ratio."""
    starts = starting_factors(theta=1e4, head_dim=64, own_context=4096, context=32768)
    assert set(starts["linear"]) == {8.0}
    assert starts["ntk"][0] == 1.0 and starts["ntk"][-1] == pytest.approx(8.0)
    assert starts["yarn"][0] == 1.0 and starts["yarn"][-1] == pytest.approx(8.0)
