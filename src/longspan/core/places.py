"""Classes that tables name by their place, "module:Class", and that are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load_place(place: str) -> Any:
    """Import the module of "module:Class" and return the class."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
