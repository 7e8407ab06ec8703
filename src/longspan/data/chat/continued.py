"""Records of several conversations that begin alike: `messages`, and `branches` that go on behind them.

    {"messages": [{"role": "user", "content": "a long text"}],
     "branches": [[{"role": "user", "content": "a question"}, {"role": "assistant", "content": "its answer"}],
                  [{"role": "user", "content": "another"},    {"role": "assistant", "content": "its answer"}]]}

Each branch is a conversation of its own: no other one's question stands before it. Where the user spoke last and
speaks first, it is one turn. The text is read, stored and trained once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longspan.data.chat.branches import one_document
from longspan.data.chat.encoder import Encoded
from longspan.data.chat.messages import MessagesError, parsed, unpacked
from longspan.data.chat.stored import SPEAKERS, plain_role

BRANCHES = "branches"
"""Field of a record that holds how its messages go on."""
_NAME = "conversations that begin alike"


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


def continued(messages: Any, branch: Sequence[Any]) -> list[Any]:
    """Return a conversation and how it goes on as one; text of the user on both sides of the border is one turn.

    Raises:
        MessagesError: `messages` is no list of turns.
    """
    if isinstance(messages, str):
        messages = parsed(messages, "the conversation")
    if not isinstance(messages, Sequence):
        raise MessagesError(
            "not a conversation", found=repr(messages)[:80], allowed="a list of at least one turn"
        )
    before = unpacked(messages[-1], len(messages) - 1) if messages else None
    after = unpacked(branch[0], len(messages))
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for who, what in SPEAKERS:
            speakers = {plain_role(str(each.get(who))) for each in (before, after)}
            said = [each.get(what) for each in (before, after)]
            if speakers == {"user"} and isinstance(said[0], str) and isinstance(said[1], str):
                return [*messages[:-1], {**before, **after, what: said[0] + said[1]}, *branch[1:]]
    return [*messages, *branch]


def encode_branches(
    samples: Sequence[Sequence[Encoded]], *, max_tokens: int | None, too_long: str
) -> list[Encoded]:
    """Return the conversations of a record as one document, or several where it is split.

    Args:
        samples: of each conversation; one, or with true prefixes several.
        max_tokens: of a document, what is shared counted once. `too_long` "cut" leaves the last conversations out.

    Raises:
        MessagesError: the record is longer and `too_long` is "drop", or each of its conversations is longer.
    """

    def document(group: Sequence[Sequence[Encoded]]) -> Encoded:
        return one_document([each for sample in group for each in sample], _NAME)

    whole = document(samples)
    if max_tokens is None or len(whole.ids) <= max_tokens:
        return [whole]
    groups: list[list[Sequence[Encoded]]] = []
    for sample in samples:
        if groups and len(document([*groups[-1], sample]).ids) <= max_tokens:
            groups[-1].append(sample)
        elif len(document([sample]).ids) <= max_tokens:
            groups.append([sample])
    if too_long == "drop" or not groups:
        raise MessagesError(
            "the conversation is longer than max_tokens", found=f"{len(whole.ids)} tokens", allowed=max_tokens
        )
    kept = groups[:1] if too_long == "cut" else groups
    made = [document(group) for group in kept]
    notes = made[0].notes
    if left_out := len(samples) - sum(map(len, kept)):
        notes["branches left out, longer than max_tokens"] += left_out
    if len(made) > 1:
        notes["conversations split, longer than max_tokens"] += 1
        notes["conversations that these became"] += len(made)
    return made
