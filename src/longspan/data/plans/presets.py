"""Published mixtures, ready for `data mix --preset`: shares of tokens by source.

slimpajama        Fu et al. 2024 (arXiv:2402.10171): the original mix of SlimPajama, long documents upsampled
prolong           Gao et al. 2024 (arXiv:2410.02660): the mixes of the 64K and the 512K stage
cepe              Yen et al. 2024 (arXiv:2402.16617): RedPajama concatenated, and ArXiv and books alone

A preset names sources; names are compared without case, without a leading "RedPajama" and with "-", "_" and
spaces alike, so "RedPajamaC4" is "c4".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longspan.core.errors import ArgumentError, ConfigError

_SLIMPAJAMA = {
    "C4": 0.26609933,
    "CommonCrawl": 0.53374772,
    "StackExchange": 0.03169647,
    "Wikipedia": 0.03402128,
    "Github": 0.05004782,
    "ArXiv": 0.04290379,
    "Book": 0.0414836,
}


class MixturePreset(NamedTuple):
    """Shares of sources and what happens to short documents."""

    about: str
    weights: dict[str, float]
    keep_short: float | None = None
    threshold: int = 4096

    def weights_for(self, source_names: Sequence[str]) -> dict[str, float]:
        """Return the weights under the names that the data has.

        Raises:
            ConfigError: a source of the preset is not in the data.
        """
        known = {_plain(name): name for name in source_names}
        missing = [name for name in self.weights if _plain(name) not in known]
        if missing:
            raise ConfigError(
                "the data lacks sources of the preset",
                found=f"no {', '.join(missing)}",
                allowed=source_names,
                fix="give --weight SOURCE=WEIGHT for each source instead, with --mode proportions",
            )
        return {known[_plain(name)]: weight for name, weight in self.weights.items()}


PRESETS = {
    "slimpajama-per-source": MixturePreset(
        "the mix of SlimPajama itself; of documents below 4096 tokens one in ten stays",
        _SLIMPAJAMA,
        keep_short=0.1,
    ),
    "slimpajama-upsample-code-arxiv-book": MixturePreset(
        "Github, ArXiv and Book at 0.60 each beside the shares of the others, normalised",
        {**_SLIMPAJAMA, "Github": 0.60, "ArXiv": 0.60, "Book": 0.60},
        keep_short=0.1,
    ),
    "prolong-64k": MixturePreset(
        "the 64K stage",
        {
            "code-repo": 0.3,
            "book": 0.3,
            "fineweb-edu": 0.1,
            "fineweb": 0.1,
            "stackexchange": 0.04,
            "wikipedia": 0.04,
            "tulu": 0.03,
            "arxiv": 0.03,
            "openwebmath": 0.03,
            "textbooks": 0.03,
        },
    ),
    "prolong-512k": MixturePreset(
        "the 512K stage: code and books in documents of up to 512K and of up to 64K tokens",
        {
            "code-repo-512k": 0.15,
            "code-repo-64k": 0.15,
            "book-512k": 0.05,
            "book-64k": 0.25,
            "fineweb-edu": 0.1,
            "fineweb": 0.1,
            "stackexchange": 0.04,
            "wikipedia": 0.04,
            "tulu": 0.03,
            "arxiv": 0.03,
            "openwebmath": 0.03,
            "textbooks": 0.03,
        },
    ),
    "cepe-concat": MixturePreset(
        "RedPajama for encoder and decoder",
        {
            "arxiv": 0.025,
            "book": 0.045,
            "c4-rp": 0.15,
            "cc": 0.67,
            "github": 0.045,
            "stackexchange": 0.02,
            "wikipedia": 0.045,
        },
    ),
    "cepe-arxiv-book": MixturePreset("long documents of ArXiv and books alone", {"arxiv": 0.5, "book": 0.5}),
}


def load_preset(name: str) -> MixturePreset:
    """Return a preset by name. Raises ArgumentError for a name that does not exist."""
    if name not in PRESETS:
        raise ArgumentError("there is no such preset", found=name, allowed=list(PRESETS))
    return PRESETS[name]


_ALIASES = {"wiki": "wikipedia", "owm": "openwebmath", "books": "book", "commoncrawl": "cc", "c4rp": "c4"}


def _plain(name: str) -> str:
    short = "".join(letter for letter in name.lower() if letter not in "-_ ").removeprefix("redpajama")
    return _ALIASES.get(short, short)
