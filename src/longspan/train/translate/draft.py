"""A recipe while it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.train.translate.meanings import Meant

__all__ = ["RecipeDraft"]

_ORDER = (
    "seed",
    "tokenizer",
    "model",
    "lora",
    "router",
    "optimizer",
    "checkpoint",
    "parallel",
    "memory",
    "tracking",
    "runtime",
    "stages",
)


class RecipeDraft:
    """Settings that are known so far, and what is to be said with them."""

    def __init__(self, meant: Meant, folder: Path, processes: int | None) -> None:
        self.meant = meant
        self.folder = folder
        """Where the file stands; what it names is looked for there and in the working directory."""
        self.processes = processes
        """Processes that train; None: not known yet."""
        self.recipe: dict[str, Any] = {}
        self.stage: dict[str, Any] = {}
        self.remarks: list[str] = []
        self.before: list[str] = []
        self.missing: dict[str, str] = {}
        """Settings that nothing says, with words for them."""
        self.adapter: str | None = None
        """lora, qlora, or None where all weights are trained."""

    def put(self, section: str, name: str, value: Any) -> None:
        """Set a setting of a section; None: leave it out."""
        if value is not None:
            self.recipe.setdefault(section, {})[name] = value

    def settings(self) -> dict[str, Any]:
        """Return the recipe in the order in which people read one."""
        whole = {**self.recipe, "stages": [self.stage]}
        return {name: whole[name] for name in _ORDER if name in whole}

    def at_hand(self, name: str) -> Path | None:
        """Return a file or folder that the config names, where it is on this machine."""
        for place in (self.folder / name, Path(name).expanduser()):
            try:
                if place.exists():
                    return place
            except OSError:  # a text that is no path: too long, say
                return None
        return None
