"""Documents with facts that can be told by eye, and a scripted model that asks about them.

Every sentence is a pure function of its day: "On day 17 Ada Stone carried a copper lamp to Harrow ..."
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from tests.api.fake_server import Asked, Reply, chat

NAMES = ["Ada Stone", "Boris Vale", "Clara Finch", "Dora Wells", "Emil Hart"]
THINGS = ["lamp", "box", "letter", "rope", "mirror", "kettle", "drum"]
STUFFS = ["copper", "tin", "silver", "oaken", "paper", "glass", "iron", "clay", "wax", "bone", "amber"]
PLACES = ["Harrow", "Kestrel", "Lindow", "Marsh End", "Norwold", "Ostrey", "Pell", "Quill", "Rusper"]


def who(day: int) -> str:
    return NAMES[day % len(NAMES)]


def thing(day: int) -> str:
    return f"{STUFFS[day % len(STUFFS)]} {THINGS[day % len(THINGS)]}"


def sentence(day: int) -> str:
    return (
        f"On day {day} {who(day)} carried a {thing(day)} to {PLACES[day % len(PLACES)]}, and it was left with the "
        f"keeper of the gate."
    )


def document(number: int, sentences: int = 24) -> str:
    """A text of days that no other document has, in paragraphs of three."""
    days = range(1000 * number + 1, 1000 * number + 1 + sentences)
    return "".join(sentence(day) + ("\n\n" if place % 3 == 2 else " ") for place, day in enumerate(days))


def question(day: int) -> str:
    return f"What did {who(day)} carry to {PLACES[day % len(PLACES)]} on day {day}?"


def answer(day: int) -> str:
    return f"A {thing(day)}."


def days_in(text: str) -> list[int]:
    return [int(day) for day in re.findall(r"On day (\d+) ", text) if sentence(int(day)) in text]


def is_known(day: int) -> bool:
    """Some questions the model can answer without the text."""
    return day % 4 == 0


class Writer:
    """The script of a server: answers prompts of every kind, and remembers what it was asked."""

    def __init__(self, style: str = "strict") -> None:
        self.style = style
        self.kinds: Counter[str] = Counter()
        self.days: set[int] = set()
        """Days that a question on a single detail was written about."""

    def __call__(self, asked: Asked) -> Reply:
        prompt = asked.body["messages"][-1]["content"]
        return chat(self.reply(prompt), usage=(len(prompt) // 4, 50))

    def reply(self, prompt: str) -> str:
        if prompt.startswith("Answer from what you know"):
            self.kinds["closed book"] += 1
            day = re.search(r"on day (\d+)\?", prompt)
            return answer(int(day.group(1))) if day and is_known(int(day.group(1))) else "unknown"
        shown = prompt.split("=" * 20)[1]
        if "[Passage 2]" in shown:
            self.kinds["multi_detail"] += 1
            return written(self.compared(shown), self.style)
        if '"character"' in prompt:
            self.kinds["biography"] += 1
            return written(self.people(shown), self.style)
        if '"number"' in prompt:
            self.kinds["research_questions"] += 1
            return written(self.listed(shown), self.style)
        self.kinds["one_detail"] += 1
        days = days_in(shown)[:4]
        self.days.update(days)
        return written(
            [{"question": question(day), "answer": answer(day), "evidence": sentence(day)} for day in days],
            self.style,
        )

    def compared(self, shown: str) -> list[dict[str, Any]]:
        passages = re.split(r"\[Passage \d+\]", shown)[1:]
        one, two = (days_in(passage)[0] for passage in (passages[0], passages[-1]))
        return [
            {
                "question": f"Which things were carried by {who(one)} on day {one} and by {who(two)} on day {two}?",
                "answer": f"A {thing(one)} on day {one} and a {thing(two)} on day {two}.",
                "sections": [1, len(passages)],
            },
            {"question": "What is said here?", "answer": "A thing was carried.", "sections": [1]},
        ]

    def people(self, shown: str) -> list[dict[str, Any]]:
        found = []
        for name in [*NAMES, "Nobody Known"]:
            deeds = [
                f"carried a {thing(day)} to {PLACES[day % 9]} on day {day}"
                for day in days_in(shown)
                if who(day) == name
            ]
            found.append({"character": name, "summary": f"{name} {', then '.join(deeds[:3]) or 'slept'}."})
        return found

    def listed(self, shown: str) -> list[dict[str, Any]]:
        return [
            {"number": number, "answer": sentence(day), "evidence": sentence(day)}
            for number, day in enumerate(days_in(shown)[:6], 1)
        ]


def written(values: list[dict[str, Any]], style: str) -> str:
    """Write values as models do."""
    if style == "fenced":
        return f"Here you are:\n```json\n{json.dumps(values, indent=1)}\n```\nAnything else?"
    if style == "python":
        return repr(values)
    if style == "wrapped":
        return json.dumps({"questions": values})
    if style == "truncated":
        return json.dumps(values)[:-20]
    return json.dumps(values)
