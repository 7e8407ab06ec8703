"""Conversations as tools and data sets store them, rewritten to the turns of OpenAI's chat interface.

    ShareGPT            {"from": "function_call", "value": "{name, arguments}"}, {"from": "observation", ...}
    Anthropic           content blocks: text, thinking, tool_use; tool_result in the user's turn
    Responses           items: message, reasoning, function_call, function_call_output
    gpt-oss             assistant turns by channel: analysis, commentary to functions.NAME, final
    Hermes, Qwen XML    <tool_call>{...}</tool_call>, <function=NAME><parameter=KEY>..., <tool_response> in a text
    SWE trajectories    steps of thought, action, observation; turns of "ai" with their `text`

Nothing is checked here: what cannot be read stays as it is, and `messages.as_messages` says what is wrong with it.
What was rewritten at a loss is counted by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from longspan.data.chat.calls_in_text import calls_of, results_of, thoughts_of
from longspan.data.chat.messages import (
    CALLS,
    LEARNT,
    NOT_LEARNT,
    ROLES,
    THOUGHTS,
    MessagesError,
    calls_in,
    is_learnt,
    parsed,
    unpacked,
)
from longspan.data.chat.stored_calls import with_arguments, with_ids

Turn = dict[str, Any]

IMAGES = (
    "image",
    "image_url",
    "input_image",
    "video",
    "video_url",
    "audio",
    "input_audio",
    "file",
    "input_file",
)
"""Types of parts of a content that hold something else than text."""
PLACEHOLDER = "[{}]"
"""What stands for such a part where it is replaced."""
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_CHANNEL = ("channel", "recipient", "content_type")
"""Keys of gpt-oss that say where a message goes."""
_PLACES = {"thinking": 0, **dict.fromkeys(_TEXT_PARTS, 1), "tool_use": 2}
"""Where templates write the parts of an answer."""
SPEAKERS = (("role", "content"), ("from", "value"), ("role", "text"))
"""Keys of who speaks and what is said."""
_TO_CALL = ("function_call", "tool_call")
_RESULT_ROLES = (
    "tool",
    "observation",
    "function",
    "tool_response",
    "function_response",
    "tool_result",
    "ipython",
    "environment",
)
_ROLES = {
    **ROLES,
    "developer": "system",
    "ai": "assistant",
    "agent": "assistant",
    "user_input": "user",
    **dict.fromkeys(_RESULT_ROLES, "tool"),
}


class Stored(NamedTuple):
    """A conversation in one form."""

    turns: Any
    """A list of turns, or what was given where it is none."""
    values: dict[str, Any]
    """The other fields of the record."""
    notes: Counter[str]
    """What was rewritten at a loss, with a number of turns."""


def rewritten(
    turns: Any, values: Mapping[str, Any], *, names: Collection[str] = (), replace_images: bool = False
) -> Stored:
    """Return a conversation as turns of OpenAI's chat interface.

    Args:
        names: every name that the template reads. Calls and thoughts that stand in a text are taken out of it only
            for a template that writes them from keys of their own.
        replace_images: images and the like become a word in brackets, counted; else they stay, to be refused.
    """
    notes: Counter[str] = Counter()
    values = dict(values)
    if values.get("functions") is not None and values.get("tools") is None and "functions" not in names:
        values["tools"] = values.pop("functions")
    if values.get("tools") is not None:
        values["tools"] = _tools(values["tools"])
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parsed(turns, "the conversation")
    if not isinstance(turns, (list, tuple)):
        return Stored(turns, values, notes)
    made: list[Any] = []
    for turn in turns:
        turn = unpacked(turn, len(made))
        if not isinstance(turn, Mapping):
            made.append(turn)
            continue
        known = {str(key): value for key, value in turn.items() if value is not None}
        known |= calls_in(known, len(made))
        for each in _steps(known):
            made += _of_item(each, notes, replace_images) if "role" in each else [each]
    if CALLS[0] in names:
        made = [each for turn in made for each in _out_of_text(turn, notes)]
    made = _joined(_own_thoughts(made, names, notes))
    return Stored(with_ids(with_arguments(_one_system(made, notes), notes)), values, notes)


def plain_role(role: str) -> str:
    """Return who speaks as OpenAI's chat interface names them; a name that is none of them stays."""
    role = role.strip().lower()
    return _ROLES.get(role, role)


def _steps(turn: Turn) -> Iterator[Turn]:
    """Yield the turns of one entry: two for a step of an agent; each with `role` and `content`, if it can be said."""
    if "role" not in turn and "from" not in turn and ("action" in turn or "observation" in turn):
        said = turn.get("response") or "\n\n".join(
            str(turn[key]).strip() for key in ("thought", "action") if turn.get(key)
        )
        marks: Turn = {key: turn[key] for key in (*LEARNT, *NOT_LEARNT) if key in turn}
        if said:
            yield {"role": "assistant", "content": said, **marks}
        if turn.get("observation"):
            yield {"role": "user", "content": turn["observation"]}
        return
    if "role" not in turn and turn.get("type") in ("function_call", "function_call_output", "reasoning"):
        yield {"role": turn["type"], **turn}
        return
    author = turn.get("author")
    if "role" not in turn and isinstance(author, Mapping):
        turn = {**{key: value for key, value in turn.items() if key != "author"}, **author}
    # A row of a table that keeps the system's words apart.
    if turn.get("role") == "system" and isinstance(turn.get("system_prompt"), str) and not turn.get("text"):
        yield {"role": "system", "content": turn["system_prompt"]}
        return
    speaker = next((each for each in SPEAKERS if each[0] in turn and each[1] in turn), None)
    if speaker is None and "from" in turn and "role" not in turn:
        speaker = ("from", "value")
    if speaker is not None:
        who, what = speaker
        rest = {key: value for key, value in turn.items() if key not in speaker}
        turn = {"role": turn[who], **({"content": turn[what]} if what in turn else {}), **rest}
    yield turn


def _of_item(turn: Turn, notes: Counter[str], replace_images: bool) -> list[Any]:
    """Return the turns that one turn of any dialect stands for."""
    role = turn["role"]
    if not isinstance(role, str):
        return [turn]
    role = role.strip().lower()
    if role in _TO_CALL:
        return [_called(turn)]
    if role == "function_call_output":
        role, turn = "tool", {"role": "tool", "content": turn.get("output", ""), **_id_of(turn)}
    if role == "reasoning":
        texts = [
            each["text"]
            for listed in (turn.get("content"), turn.get("summary"))
            for each in (listed if isinstance(listed, list) else ())
            if isinstance(each, Mapping) and isinstance(each.get("text"), str)
        ]
        if not texts:
            notes["thoughts that the record keeps encrypted or not at all"] += 1
            return []
        return [{"role": "assistant", "content": "", THOUGHTS[0]: "\n\n".join(texts), "_part": True}]
    turn = {**turn, "role": plain_role(role)}
    if role == "assistant" and isinstance(turn.get("channel"), str):
        return [_of_channel(turn)]
    if turn["role"] == "tool" and "tool_call_id" not in turn:
        turn |= _id_of(turn)
    content = turn.get("content")
    if isinstance(content, Mapping) and "type" in content:
        content = [content]
    if turn["role"] == "tool":
        turn = {key: value for key, value in turn.items() if key not in _CHANNEL}
        turn["content"] = content = _result(content)
    if isinstance(content, (list, tuple)):
        return _of_blocks(turn, content, notes, replace_images)
    if role == "assistant" and not content and isinstance(turn.get("refusal"), str):
        # What it said in place of a content, as its part of a content.
        return [
            {key: value for key, value in turn.items() if key != "refusal"} | {"content": turn["refusal"]}
        ]
    return [turn]


def _result(content: Any) -> Any:
    """Return what a tool returned, as parts where it is in parts, else as a text: JSON of any other value."""
    if content is None:
        return ""
    if isinstance(content, (list, tuple)) and (not content or any(map(_is_part, content))):
        return content
    return _text(content)


def _is_part(value: Any) -> bool:
    """Say whether a value is a part of a content, and no data of a tool's own."""
    if not isinstance(value, Mapping):
        return False
    return value.get("type") in (*IMAGES, *_TEXT_PARTS) or value.keys() == {"text"}


def _of_blocks(turn: Turn, blocks: Sequence[Any], notes: Counter[str], replace_images: bool) -> list[Turn]:
    """Return the turns of a content in parts: results of tools become turns before it, calls and thoughts keys."""
    parts: list[Any] = []
    results: list[Turn] = []
    calls: list[Any] = []
    thoughts: list[str] = []
    blocks = _filled(blocks)
    kinds = [block.get("type", "text") if isinstance(block, Mapping) else None for block in blocks]
    for kind, block in zip(kinds, blocks):
        if kind in _TEXT_PARTS and isinstance(_words(block), str):
            parts.append({"type": "text", "text": _words(block)})
        elif kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "redacted_thinking":
            notes["thoughts that the record keeps encrypted or not at all"] += 1
        elif kind == "tool_use" and isinstance(block.get("name"), str):
            function = {"name": block["name"], "arguments": block.get("input", {})}
            calls.append({"type": "function", "function": function, **_id_of(block)})
        elif kind == "tool_result":
            inner = _result(block.get("content", ""))
            result = {"role": "tool", "content": inner, **_id_of(block)}
            if block.get("is_error"):
                result["is_error"] = True
            in_parts = isinstance(inner, (list, tuple))
            results += _of_blocks(result, inner, notes, replace_images) if in_parts else [result]
        elif kind in IMAGES and replace_images:
            parts.append({"type": "text", "text": PLACEHOLDER.format(str(kind).split("_")[0])})
            notes["images and the like replaced by a word"] += 1
        else:
            parts.append(block)
    order = [_PLACES[kind] for kind in kinds if isinstance(kind, str) and kind in _PLACES]
    if turn["role"] == "assistant" and order != sorted(order):
        notes["answers whose thoughts, text and calls are put in this order"] += 1
    made = {**turn, "content": parts if parts or not (calls or thoughts or results) else ""}
    if thoughts and not any(turn.get(key) for key in THOUGHTS):
        made[THOUGHTS[0]] = "\n\n".join(thoughts)
    if calls and not turn.get(CALLS[0]):
        made[CALLS[0]] = calls
    if results and not parts and not calls and not thoughts:
        return results
    return [*results, made]


def _of_channel(turn: Turn) -> Turn:
    """Return a message of gpt-oss: thoughts, a call or what the user reads, to be joined with its neighbours."""
    rest = {key: value for key, value in turn.items() if key not in _CHANNEL}
    content = rest["content"] = _joined_text(turn.get("content", ""))
    recipient = turn.get("recipient")
    if isinstance(recipient, str) and recipient not in ("all", "assistant", "user"):
        name = recipient.removeprefix("functions.")
        function = {"name": name, "arguments": _text(content)}
        return {**rest, "content": "", CALLS[0]: [{"type": "function", "function": function}], "_part": True}
    if turn["channel"] == "analysis":
        return {**rest, "content": "", THOUGHTS[0]: _text(content), "_part": True}
    # What is said beside a call (a preamble) is a content too.
    return {**rest, "_part": True}


def _called(turn: Turn) -> Turn:
    """Return an assistant's turn of a turn that is a call, or several: JSON text, or the call's own keys."""
    value = turn.get("content")
    if value is None and "name" in turn:
        value = {"name": turn["name"], "arguments": turn.get("arguments", {})}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise MessagesError("a call of a tool is a text that is not JSON", found=value[:60]) from None
    calls = [
        {"type": "function", "function": call.get("function", call), **_id_of(turn)}
        if isinstance(call, Mapping)
        else call
        for call in (value if isinstance(value, list) else [value])
    ]
    used = ("role", "content", "name", "arguments", "type", "id", "call_id", "status")
    rest = {key: each for key, each in turn.items() if key not in used}
    return {"role": "assistant", "content": "", CALLS[0]: calls, **rest, "_part": True}


def _out_of_text(turn: Any, notes: Counter[str]) -> list[Any]:
    """Return a turn with the calls that stand in its text as calls, and the results of tools as turns of tools."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str) or turn.get(CALLS[0]):
        return [turn]
    text = turn["content"]
    if turn.get("role") == "assistant" and (found := calls_of(text)) is not None:
        said, calls = found
        made = [{"type": "function", "function": call} for call in calls]
        return [{**turn, "content": said, CALLS[0]: made}]
    if turn.get("role") == "assistant" and "<tool_call>" in text:
        notes["answers with calls in their text that are broken, or not its end: they stay text"] += 1
    if turn.get("role") in ("user", "tool") and (results := results_of(text)) is not None:
        return [{**turn, "role": "tool", "content": result} for result in results]
    return [turn]


def _own_thoughts(turns: list[Any], names: Collection[str], notes: Counter[str]) -> list[Any]:
    """Return turns whose thoughts stand under a key, for a template that reads such a key: once where they stand in
    the content too, and those of the content alone where it does not look for them there."""
    if not {*THOUGHTS} & {*names}:
        return turns
    made = []
    for turn in turns:
        answers = isinstance(turn, Mapping) and turn.get("role") == "assistant"
        if answers and isinstance(turn.get("content"), str):
            thoughts, rest = thoughts_of(turn["content"])
            known = next((turn[key] for key in THOUGHTS if turn.get(key)), None)
            if thoughts and known is None and "</think>" not in names:
                turn = {**turn, "content": rest, THOUGHTS[0]: thoughts}
            elif thoughts and isinstance(known, str) and known.strip() == thoughts:
                turn = {**turn, "content": rest}
            elif thoughts and known is not None:
                notes["answers with thoughts in their text and others beside it"] += 1
        made.append(turn)
    return made


def _joined(turns: Sequence[Any]) -> list[Any]:
    """Return turns with the parts of one answer (thoughts, text, calls) as one turn."""
    made: list[Any] = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            made.append(turn)
            continue
        part = turn.get("_part", False)
        turn = _OpenTurn({key: value for key, value in turn.items() if key != "_part"})
        before = made[-1] if made else None
        if (
            turn.get("role") == "assistant"
            and isinstance(before, _OpenTurn)
            and before.open
            and _fits(before, turn)
        ):
            _add(before, turn, len(made) - 1)
            turn = before
        else:
            made.append(turn)
        turn.open = part
    return [dict(turn) if isinstance(turn, _OpenTurn) else turn for turn in made]


def _add(before: Turn, turn: Turn, number: int) -> None:
    """Add the next part of an answer to what was there of it. Raises MessagesError where one is learnt, one not."""
    if is_learnt(before, number) != is_learnt(turn, number):
        raise MessagesError("an answer stands in several turns, of which one is to be learnt and another not")
    for key, value in turn.items():
        old = before.get(key)
        if key in (*THOUGHTS, "content") and isinstance(old, str) and isinstance(value, str):
            before[key] = "\n\n".join(filter(None, (old, value)))
        elif key == CALLS[0] and isinstance(old, list) and isinstance(value, list):
            before[key] = [*old, *value]
        elif value or key not in before:
            before[key] = value


class _OpenTurn(dict[str, Any]):
    """A turn; while it is open, another part of the answer may follow."""

    open = False


def _fits(before: Turn, turn: Turn) -> bool:
    """Say whether a turn goes on with the answer before it: nothing is said behind a call, nor thought."""
    return not before.get(CALLS[0]) or not (turn.get("content") or any(turn.get(key) for key in THOUGHTS))


def _one_system(turns: list[Any], notes: Counter[str]) -> list[Any]:
    """Return turns whose leading system turns (a developer's behind the system's) are one."""
    count = 0
    while (
        count < len(turns)
        and isinstance(turns[count], Mapping)
        and turns[count].get("role") == "system"
        and isinstance(_joined_text(turns[count].get("content")), str)
    ):
        count += 1
    if count < 2:
        return turns
    notes["conversations whose first system turns are joined to one"] += 1
    return [
        {
            **turns[0],
            "content": "\n\n".join(filter(None, (_joined_text(turn["content"]) for turn in turns[:count]))),
        },
        *turns[count:],
    ]


def _tools(tools: Any) -> Any:
    """Return schemas of tools as OpenAI's chat interface has them; what is none stays as it is."""
    if isinstance(tools, str) and tools.strip():
        tools = parsed(tools, "tools")
    if isinstance(tools, Mapping) and isinstance(tools.get("name"), str):
        tools = [tools]
    if not isinstance(tools, (list, tuple)):
        return tools
    return [_tool(parsed(each, "tools") if isinstance(each, str) else each) for each in tools]


def _tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    function = {
        key: value for key, value in tool.items() if key not in ("type", "input_schema", "cache_control")
    }
    if "input_schema" in tool:
        function["parameters"] = tool["input_schema"]
    return {"type": "function", "function": function}


def _id_of(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return the id that a call, or a result, names."""
    calls = turn.get("type") in ("tool_use", "function_call") or turn.get("role") in _TO_CALL
    keys = ("call_id", "id") if calls else ("tool_call_id", "tool_use_id", "call_id")
    found = next((turn[key] for key in keys if isinstance(turn.get(key), str)), None)
    return {} if found is None else {"id" if calls else "tool_call_id": found}


def _joined_text(content: Any) -> Any:
    """Return a content whose parts are texts as one text; any other stays as it is."""
    if not isinstance(content, (list, tuple)) or not all(map(_is_part, content)):
        return content
    texts = [_words(part) for part in _filled(content)]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else content


def _filled(parts: Sequence[Any]) -> list[Any]:
    """Return parts without texts that are null: tables give every part the keys of all."""
    return [
        part
        for part in parts
        if not isinstance(part, Mapping)
        or part.get("type", "text") not in _TEXT_PARTS
        or "text" not in part
        or _words(part) is not None
    ]


def _words(part: Mapping[str, Any]) -> Any:
    """Return what a part says, or refuses to."""
    return part.get("refusal") if part.get("text") is None else part["text"]


def _text(value: Any) -> str:
    """Return a text, or the JSON of another value."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise MessagesError("a turn holds values that are not JSON", found=repr(value)[:60]) from None
