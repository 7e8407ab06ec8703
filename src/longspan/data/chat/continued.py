"""Records of several conversations that begin alike: `messages`, and `branches` that go on behind them.

    {"messages": [{"role": "user", "content": "a long text"}],
     "branches": [[{"role": "user", "content": "a question"}, {"role": "assistant", "content": "its answer"}],
                  [{"role": "user", "content": "another"},    {"role": "assistant", "content": "its answer"}]]}

Each branch is a conversation of its own: no other one's question stands before it. Where the user spoke last and
speaks first, it is one turn. The text is read, stored and trained once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from longspan.data.chat.branches import GrowingTree, one_document
from longspan.data.chat.encoder import Encoded
from longspan.data.chat.messages import MessagesError, parsed, unpacked
from longspan.data.chat.stored import SPEAKERS, Stored, plain_role

BRANCHES = "branches"
"""Field of a record that holds how its messages go on."""
WITHOUT_FIRST = "conversations without their first turn, which is not the user's"
BEGIN_ALIKE = "conversations that begin alike"


def branches_of(values: Mapping[str, Any]) -> list[list[Any]]:
    """Return the branches of a record, [] where it has none.

    Raises:
        MessagesError: they are no list of lists of turns.
    """
    found = values.get(BRANCHES)
    if found is None:
        return []
    if isinstance(found, str):
        found = parsed(found, BRANCHES)
    lists = isinstance(found, Sequence) and not isinstance(found, str)
    branches = [parsed(each, BRANCHES) if isinstance(each, str) else each for each in found] if lists else []
    if not branches or not all(isinstance(each, Sequence) and each for each in branches):
        raise MessagesError(
            f"`{BRANCHES}` does not say how a conversation goes on",
            found=repr(found)[:80],
            allowed="a list of lists of turns, each of one turn at least",
        )
    return [list(each) for each in branches]


class ReadBranches(NamedTuple):
    """Each branch as a conversation of its own, in one form."""

    conversations: list[Stored]
    shared: list[int]
    """How many of the first turns of each stand before its branch; what the user says on both sides is one of them,
    unless the branch gives it keys of its own."""
    notes: Counter[str]
    """What was rewritten at a loss before all branches."""

    @property
    def all_notes(self) -> Counter[str]:
        """What was rewritten at a loss, before the branches and in each."""
        alone = [self.branch(number, [], []) for number in range(len(self.conversations))]
        return sum((each.own for each in alone), _once(alone))

    def branch(self, number: int, samples: list[Encoded], of_turns: Sequence[Counter[str]]) -> Branch:
        """Return a branch with its notes apart from those of what it shares.

        Args:
            samples: with notes of the conversation as a whole.
            of_turns: notes of each turn.
        """
        stored, shared = self.conversations[number].notes, self.shared[number]
        own = sum((each.notes for each in samples), stored - self.notes)
        return Branch(samples, sum(of_turns[:shared], stored & self.notes), sum(of_turns[shared:], own))


class Branch(NamedTuple):
    """A branch, encoded."""

    samples: list[Encoded]
    """One, or with true prefixes several."""
    shared: Counter[str]
    """Notes of what stands before all branches."""
    own: Counter[str]


def read_branches(
    read: Callable[[Any, Mapping[str, Any]], Stored],
    rewritten: Callable[[Any, Mapping[str, Any]], Stored],
    messages: Any,
    branches: Sequence[Sequence[Any]],
    values: Mapping[str, Any],
) -> ReadBranches:
    """Return branches as conversations of their own.

    Args:
        read: brings a conversation to one form, or raises MessagesError.
        rewritten: brings a part of one to it.

    Raises:
        MessagesError: `messages` is no list of turns, or one of the conversations is none.
    """
    if isinstance(messages, str):
        messages = parsed(messages, "the conversation")
    if not isinstance(messages, Sequence):
        raise MessagesError(
            "not a conversation", found=repr(messages)[:80], allowed="a list of at least one turn"
        )
    joined = [_joined_turn(messages, branch) for branch in branches]
    conversations = [
        read([*messages, *branch] if turn is None else [*messages[:-1], turn, *branch[1:]], values)
        for turn, branch in zip(joined, branches, strict=True)
    ]
    before = rewritten(messages, values)
    turns = len(before.turns)
    if turns and WITHOUT_FIRST in conversations[0].notes:
        turns -= 1
    shared = [
        turns - (turn is not None and _has_keys(unpacked(branch[0], 0)))
        for turn, branch in zip(joined, branches, strict=True)
    ]
    return ReadBranches(conversations, shared, before.notes)


def encode_branches(branches: Sequence[Branch], *, max_tokens: int | None, too_long: str) -> list[Encoded]:
    """Return the conversations of a record as one document, or several where it is split.

    Args:
        max_tokens: of a document, what is shared counted once. `too_long` "cut" leaves the last conversations out.

    Raises:
        MessagesError: the record is longer and `too_long` is "drop", or each of its conversations is longer.
    """
    groups = [list(branches)]
    whole = _document(branches)
    if max_tokens is not None and len(whole.ids) > max_tokens:
        groups = _groups(branches, max_tokens)
        if too_long == "drop" or not groups:
            raise MessagesError(
                "the conversation is longer than max_tokens",
                found=f"{len(whole.ids)} tokens",
                allowed=max_tokens,
            )
        if too_long == "cut":
            del groups[1:]
    made = [whole] if len(groups) == 1 and len(groups[0]) == len(branches) else [*map(_document, groups)]
    kept = [branch for group in groups for branch in group]
    notes = made[0].notes
    notes.update(_once(kept))
    if left_out := len(branches) - len(kept):
        notes["branches left out, longer than max_tokens"] += left_out
    if len(made) > 1:
        notes["conversations split, longer than max_tokens"] += 1
        notes["conversations that these became"] += len(made)
    return made


def _once(branches: Sequence[Branch]) -> Counter[str]:
    """Return notes of what branches share, each once."""
    return reduce(or_, (each.shared for each in branches))


def _document(branches: Sequence[Branch]) -> Encoded:
    """Return branches as one document, with the notes that are their own."""
    samples = [sample._replace(notes=Counter()) for branch in branches for sample in branch.samples]
    made = one_document(samples, BEGIN_ALIKE)
    return made._replace(notes=sum((each.own for each in branches), made.notes))


def _groups(branches: Sequence[Branch], max_tokens: int) -> list[list[Branch]]:
    """Return branches by documents of as many as have room; those that are too long alone are in none."""
    groups: list[list[Branch]] = []
    tree = GrowingTree()
    for branch in branches:
        if groups and (grown := _grown(tree, branch)).size <= max_tokens:
            groups[-1].append(branch)
        elif (grown := _grown(GrowingTree(), branch)).size <= max_tokens:
            groups.append([branch])
        else:
            continue
        tree = grown
    return groups


def _grown(tree: GrowingTree, branch: Branch) -> GrowingTree:
    tree = tree.copy()
    for sample in branch.samples:
        tree.add(sample.ids, sample.mask)
    return tree


def _joined_turn(messages: Sequence[Any], branch: Sequence[Any]) -> dict[str, Any] | None:
    """Return what the user says on both sides of the border as one turn; None where it is not the user on both."""
    before = unpacked(messages[-1], len(messages) - 1) if messages else None
    after = unpacked(branch[0], len(messages))
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for who, what in SPEAKERS:
            speakers = {plain_role(str(each.get(who))) for each in (before, after)}
            said = [each.get(what) for each in (before, after)]
            if speakers == {"user"} and isinstance(said[0], str) and isinstance(said[1], str):
                # Tables give every turn the keys of all: null takes nothing away.
                own = {key: value for key, value in after.items() if value is not None}
                return {**before, **own, what: said[0] + said[1]}
    return None


def _has_keys(turn: Mapping[str, Any]) -> bool:
    """Say whether a turn holds more than who speaks and what is said."""
    speech = {key for keys in SPEAKERS for key in keys}
    return any(value is not None for key, value in turn.items() if key not in speech)
