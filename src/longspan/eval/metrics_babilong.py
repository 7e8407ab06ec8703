"""BABILong's metric: the right label, and no other one, stands in the first sentence of an answer."""

from __future__ import annotations

from collections.abc import Mapping

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_YES_NO = ("no", "yes")
_STEPS = ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w")
LABELS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _PLACES),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), _YES_NO),
    "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", "no", "yes"),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": _STEPS,
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
"""What is answered, by task."""


def label_named(target: str, output: str, *, question: str, subtask: str) -> float:
    """Return 1.0 where the label, or every part of "apple,milk", is named, and no other that the question does not."""
    said = output.lower().split(".")[0]
    for mark in ("<context>", "<example>"):
        said = said.split(mark)[0]
    labels = {label for label in LABELS[subtask] if label not in question.lower()}
    named = {label for label in labels if label in said}
    target = target.lower()
    wanted = set(target.split(",")) if "," in target and len(target) > 3 else {target}
    return float(named == wanted)
