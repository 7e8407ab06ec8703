"""Which documents of token stores are trained on: `longspan data mix` as a function."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.columns import folder_kind
from longspan.core.errors import ArgumentError
from longspan.data.plans.mixture import KIND, MixturePlan, load_audit, plan_mixture
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.plans.presets import load_preset
from longspan.data.plans.shares import parse_stream, stream_settings
from longspan.data.store import TokenStore
from longspan.data.store.lengths import LengthTable
from longspan.steps.stores import check_lengths, lengths_of, one_or_more, stores_of

__all__ = ["MixResult", "mix_stores", "named_mixture"]


class MixResult(NamedTuple):
    """What was chosen, and from what."""

    plan: MixturePlan
    stores: list[str]
    """Absolute paths, which the plan remembers."""
    lengths: LengthTable
    """Of all documents of the stores; `plan.documents` are rows of it."""


def mix_stores(
    stores: str | Path | Sequence[str | Path],
    out: str | Path,
    config: MixtureConfig | None = None,
    *,
    preset: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> MixResult:
    """Choose documents by length and source; write a mixture plan to `out`, in place of one that is there.

    Args:
        stores: token stores; `STORE@0.3` is a share, `STORE#2` two uses. Or one part of `data split`.
        config: what is chosen. Its fields may also be given as keywords: `mode="per_source", tokens=2_000`.
        preset: published shares instead, such as slimpajama-per-source.

    Raises:
        ArgumentError: names, `preset` and settings that say different things.
        ConfigError: settings that there are not, that contradict one another, or that ask for unknown sources.
        DataError: a store is missing or made with another tokenizer, or no document is left to choose from.
    """
    names = one_or_more(stores)
    if config is None:
        paths, asked = named_mixture(names, preset, settings)
    else:
        if preset is not None:
            raise ArgumentError("a preset and a config say the same", fix="leave out one of them")
        paths, named = named_mixture(names, None, ())
        asked = config.to_dict()
        if MixtureConfig.from_dict({**asked, **named}) != config:
            raise ArgumentError("the stores' names ask for another mixture than config", found=named)
    config = MixtureConfig.from_dict({**asked, **settings}, where="the mixture")
    table, paths = lengths_of(paths)
    plan = plan_mixture(config, table, seed, audit=load_audit(config))
    plan.save(out, stores=paths)
    return MixResult(plan, paths, table)


def named_mixture(
    stores: Sequence[str], preset: str | None, given: Collection[str]
) -> tuple[list[str], dict[str, Any]]:
    """Return the stores that are meant, and the settings of a `MixtureConfig` that names, a part or a preset ask for.

    Raises:
        ArgumentError: they ask for different things, or for what the settings `given` say too.
    """
    streams = [parse_stream(store) for store in stores]
    paths, part = _part([stream.path for stream in streams])
    asked = stream_settings(streams)
    if preset is not None:
        if asked:
            raise ArgumentError("--preset has shares of its own", fix="name the stores without @ and #")
        asked = _preset(preset, paths)
    elif asked and (clash := {"mode", "weights"}.intersection(given)):
        raise ArgumentError("STORE@SHARE and STORE#USES say what is mixed", found=f"--{min(clash)} too")
    return paths, asked if part is None else {**asked, "part": part}


def _part(inputs: list[str]) -> tuple[list[str], tuple[float, float] | None]:
    """Return the stores to mix, and the part of them where a plan of `data split` is given."""
    plans = [path for path in inputs if folder_kind(path) == KIND]
    if not plans:
        return inputs, None
    plan = MixturePlan.load(plans[0])
    if len(inputs) > 1 or plan.spec != MixtureConfig(mode="none", part=plan.spec.part):
        raise ArgumentError(
            "a mixture is made of stores, or of one part that `data split` made", found=", ".join(inputs)
        )
    stores = stores_of(plan.stores, Path(plans[0]))
    check_lengths(lengths_of(stores)[0], plan.lengths_fingerprint, Path(plans[0]))
    return list(map(str, stores)), plan.spec.part


def _preset(name: str, stores: list[str]) -> dict[str, Any]:
    preset = load_preset(name)
    sources = dict.fromkeys(name for store in stores for name in TokenStore(store).lengths.source_names)
    return {
        "mode": "proportions",
        "weights": preset.weights_for(tuple(sources)),
        "keep_short": preset.keep_short,
        "threshold": preset.threshold,
    }
