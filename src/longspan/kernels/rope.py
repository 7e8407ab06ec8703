"""RoPE as data: dictionaries in the form of transformers' `rope_parameters`, and the frequencies they mean.

A position p rotates the pair of channels i by the angle p * inv_freq[i], inv_freq[i] = theta**(-2i/d)
(RoFormer, arXiv:2104.09864, section 3.2). Ways to a longer context:

    default(theta)      another base ("adjusted base frequency", arXiv:2309.16039, section 2)
    linear(factor)      positions divided by the factor (position interpolation, arXiv:2306.15595)
    ntk(factor)         theta * factor**(d/(d-2)): the lowest frequency is interpolated by the factor, the
                        highest stays (NTK-aware scaling; arXiv:2309.00071, section 3.1)
    yarn, llama3, longrope, dynamic      as transformers defines them; keys are checked here

NTK-aware scaling is only another theta, so it is written as `default` and any program can load it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from longspan.core.errors import ConfigError

__all__ = [
    "REACHING_TYPES",
    "ROPE_TYPES",
    "check_reach",
    "default",
    "inv_freq",
    "inv_freq_hash",
    "linear",
    "ntk",
    "ntk_theta",
    "rope_parameters",
]

# Keys beside rope_type, rope_theta and partial_rotary_factor: (required, optional).
ROPE_TYPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "ntk": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "llama3": (
        frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
        frozenset(),
    ),
    "longrope": (
        frozenset({"short_factor", "long_factor", "original_max_position_embeddings", "factor"}),
        frozenset({"attention_factor"}),
    ),
}
REACHING_TYPES = ("linear", "ntk", "dynamic", "yarn", "longrope")
"""Types with a factor by which the context grows."""
COMMON_KEYS = frozenset({"rope_type", "rope_theta", "partial_rotary_factor"})


def default(theta: float) -> dict[str, Any]:
    """Return plain RoPE with base theta; raising it is adjusted-base-frequency context extension."""
    return rope_parameters({"rope_type": "default", "rope_theta": theta})


def linear(factor: float, *, theta: float) -> dict[str, Any]:
    """Return linear position interpolation: every position divided by `factor` (>= 1)."""
    return rope_parameters({"rope_type": "linear", "factor": factor, "rope_theta": theta})


def ntk_theta(factor: float, *, theta: float, head_dim: int) -> float:
    """Return theta * factor**(d/(d-2)), which slows the lowest frequency by exactly `factor`.

    d is the number of rotated channels: head_dim, or its rotated part where rotary is partial.
    """
    if head_dim <= 2:
        raise ConfigError("NTK-aware scaling needs more than two rotated channels", found=head_dim)
    return float(theta * factor ** (head_dim / (head_dim - 2)))


def ntk(factor: float, *, theta: float, head_dim: int) -> dict[str, Any]:
    """Return NTK-aware scaling as plain RoPE with the theta of `ntk_theta`."""
    return rope_parameters({"rope_type": "ntk", "factor": factor, "rope_theta": theta}, head_dim=head_dim)


def rope_parameters(settings: Mapping[str, Any], *, head_dim: int | None = None) -> dict[str, Any]:
    """Check RoPE settings and return them as transformers' `rope_parameters` (a new dictionary).

    Args:
        settings: `rope_type` (default "default"), `rope_theta` and the keys of that type.
        head_dim: rotated channels, needed by type "ntk" only, which becomes "default"; where it is given, LongRoPE's
            factors are counted by it.

    Raises:
        ConfigError: an unknown type, a missing or unknown key, a number outside its range, or a list of LongRoPE
            factors that has not one for each pair of channels.
    """
    found = dict(settings)
    kind = found.setdefault("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ConfigError("unknown rope_type", found=kind, allowed=sorted(ROPE_TYPES))
    required, optional = ROPE_TYPES[kind]
    missing = required | {"rope_theta"}
    missing -= found.keys()
    if missing:
        before = "original_max_position_embeddings"
        raise ConfigError(
            f"RoPE of type {kind} lacks {', '.join(sorted(missing))}",
            found=sorted(found),
            fix=f"say {before}: the context that the model was trained with" if before in missing else None,
        )
    unknown = found.keys() - required - optional - COMMON_KEYS
    if unknown:
        raise ConfigError(
            f"RoPE of type {kind} has no {', '.join(sorted(unknown))}",
            allowed=sorted(required | optional | COMMON_KEYS),
        )
    _check_range("rope_theta", found["rope_theta"], above=0.0)
    if "factor" in found:
        _check_range("factor", found["factor"], above=1.0, inclusive=True)
    if "partial_rotary_factor" in found:
        _check_range("partial_rotary_factor", found["partial_rotary_factor"], above=0.0)
    if kind == "llama3" and found["high_freq_factor"] <= found["low_freq_factor"]:
        raise ConfigError(
            "high_freq_factor must be larger than low_freq_factor",
            found=f"{found['high_freq_factor']} and {found['low_freq_factor']}",
        )
    found["rope_theta"] = float(found["rope_theta"])
    if kind == "longrope" and head_dim is not None:
        for name in ("short_factor", "long_factor"):
            if len(found[name]) != head_dim // 2:
                raise ConfigError(
                    f"LongRoPE's {name} has a number for each pair of rotated channels",
                    found=f"{len(found[name])} numbers",
                    allowed=head_dim // 2,
                )
    if kind == "ntk":
        if head_dim is None:
            raise ConfigError("NTK-aware scaling depends on the head dimension, which was not given")
        theta = ntk_theta(found.pop("factor"), theta=found["rope_theta"], head_dim=head_dim)
        found |= {"rope_type": "default", "rope_theta": theta}
    return found


def check_reach(settings: Mapping[str, Any], *, own_context: int, context: int) -> None:
    """Refuse a factor with which `context` positions do not come to lie where the model has been.

    Types with a factor map `context` positions onto context / factor; that has to be within what the RoPE counts from,
    its `original_max_position_embeddings`, or the recipe says that it is meant otherwise. That is the `own_context` of
    the model, or less: Qwen3 has 40,960 positions, and its YaRN counts from 32,768. A larger factor than needed is a
    choice. Llama-3's factor is no ratio of lengths, a theta reaches no particular length, and both are left alone.
    LongRoPE without a factor (Phi-3) reaches as far as its slowest pair is slowed.

    Args:
        settings: as for `rope_parameters`.
        own_context: positions that the model was trained on before.
        context: positions of the stage.

    Raises:
        ConfigError: the factor is too small, or `original_max_position_embeddings` is more than the model's context.
    """
    kind = settings.get("rope_type", "default")
    original = settings.get("original_max_position_embeddings", own_context)
    if kind not in REACHING_TYPES or context <= own_context:
        return
    if original > own_context:
        raise ConfigError(
            f"RoPE of type {kind}: original_max_position_embeddings is not the context of the model",
            found=f"{original}",
            allowed=f"{own_context}, or less where the model was trained on less",
        )
    factor = settings.get("factor")
    if factor is None:
        # transformers takes the ratio of the config's lengths, which follows the stage's.
        factor = max(settings["long_factor"]) if kind == "longrope" else math.inf
    if factor * original < context:
        raise ConfigError(
            f"the factor of RoPE type {kind} does not match the context length",
            found=f"factor {factor:g} x {original} of the model = {factor * original:.0f} positions, "
            f"{context} in the stage",
            allowed=f"a factor of at least {context / original:g}",
            fix="raise the factor, shorten the stage, or set the stage's rope_falls_short if it is meant so",
        )


def inv_freq(parameters: Mapping[str, Any], *, head_dim: int) -> torch.Tensor:
    """Return the inverse frequencies of types default, linear and ntk: fp32 [head_dim / 2], computed in fp64.

    transformers computes them in fp32, up to 1e-6 away in relative terms. Types whose frequencies depend on
    the sequence or the model are transformers' own; read them from a built model.

    Raises:
        ConfigError: another type.
    """
    found = rope_parameters(parameters, head_dim=head_dim)
    if found["rope_type"] not in ("default", "linear"):
        raise ConfigError(
            "these frequencies are computed by transformers when the model is built",
            found=found["rope_type"],
            allowed=["default", "linear", "ntk"],
        )
    rotated = int(head_dim * found.get("partial_rotary_factor", 1.0))
    exponent = torch.arange(0, rotated, 2, dtype=torch.float64) / rotated
    return (found["rope_theta"] ** -exponent / found.get("factor", 1.0)).float()


def inv_freq_hash(frequencies: torch.Tensor, *, attention_scaling: float = 1.0) -> str:
    """Return 16 hex characters that name a set of inverse frequencies and the factor on cos and sin.

    Values enter with 6 significant digits: the last bits of a power differ between machines, and a real
    difference between two RoPE settings never hides there.
    """
    values = [*frequencies.double().flatten().tolist(), attention_scaling]
    return hashlib.sha256(",".join(f"{value:.5e}" for value in values).encode()).hexdigest()[:16]


def _check_range(name: str, value: object, *, above: float, inclusive: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < above or (value == above and not inclusive):  # type: ignore[operator]
        raise ConfigError(
            f"RoPE {name} is out of range",
            found=value,
            allowed=f"a number {'>=' if inclusive else '>'} {above:g}",
        )
