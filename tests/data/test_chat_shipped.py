"""Shipped templates with blocks: the text of the models' own templates, and the masks of transformers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from longspan.data.chat import ChatFormat, MessagesError, load_chat_format
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.chat.template import Template, find_template
from longspan.data.tokenizer import Tokenizer, train_bpe
from tests.data.chat_tokenizers import hugging_face
from tests.data.random_chats import WORDS, with_text_arguments
from tests.data.random_chats import chat as random_chat

ALL = {"tools": True, "parallel": True, "thoughts": True, "text_beside_calls": True}
WRITTEN_BY_THE_MODELS_OWN: dict[str, tuple[dict[str, bool], str]] = {
    "deepseek-v3": ({**ALL, "thoughts": False}, "6892b5df4f6c53a9"),
    "gemma-3": ({}, "6b3336d3460ee4ea"),
    "glm-4.5": (ALL, "fadae61c1f9895b6"),
    "gpt-oss": ({**ALL, "parallel": False}, "c429b4a1d8cceda8"),
    "llama-3.1": ({"tools": True}, "3458b4f8c2c01862"),
    "mistral-v13": ({**ALL, "thoughts": False}, "05510821de06c4a4"),
    "mistral-v7": ({**ALL, "thoughts": False}, "8abe4b83a96e1185"),
    "phi-4": ({}, "7fa963836068ea9a"),
    "qwen-2.5": ({**ALL, "thoughts": False}, "9d476ab178bcc9b7"),
    "qwen-3": (ALL, "5e9e749c7f289c9f"),
    "qwen-3.5": (ALL, "3f9cdcef54e3b1ca"),
    "smollm3": (ALL, "48156fa01996da43"),
}
"""What a model's template writes of a conversation, and SHA-256 of what the template that was published with the model
writes of forty random ones, each whole and as a prompt for its last answer."""
SPECIAL = [
    "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>",
    "<start_of_turn>", "<end_of_turn>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[TOOL_CONTENT]", "[/TOOL_RESULTS]",
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>",
    *(f"<\uff5c{word}\uff5c>" for word in (
        "User", "Assistant", "end\u2581of\u2581sentence", "tool\u2581calls\u2581begin", "tool\u2581calls\u2581end",
        "tool\u2581call\u2581begin", "tool\u2581call\u2581end", "tool\u2581sep", "tool\u2581outputs\u2581begin",
        "tool\u2581outputs\u2581end", "tool\u2581output\u2581begin", "tool\u2581output\u2581end",
    )),
]  # fmt: skip
ENDS = {
    "deepseek-v3": ("<\uff5cend\u2581of\u2581sentence\uff5c>",),
    "gemma-3": ("<end_of_turn>",),
    "glm-4.5": ("<|user|>", "<|observation|>"),
    "gpt-oss": ("<|call|>", "<|end|>", "<|return|>"),
    "llama-3.1": ("<|eot_id|>",),
    "mistral-v13": ("</s>",),
    "mistral-v7": ("</s>",),
}
"""Tokens that end what is learnt; <|im_end|> elsewhere."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    texts = ["".join(WORDS), "user assistant system tool_call name arguments function parameter think"] * 20
    tokenizer = train_bpe(texts, tmp_path_factory.mktemp("shipped"), vocab_size=400, special_tokens=SPECIAL)
    return tokenizer, hugging_face(tokenizer)


def conversation(name: str, number: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    turns, more = random_chat(number, **WRITTEN_BY_THE_MODELS_OWN[name][0])
    if name == "deepseek-v3":
        # It writes no schemas of tools.
        turns, more = with_text_arguments(turns), {}
    if name == "mistral-v7":
        # It has Jinja escape the calls around arguments that are objects.
        turns = with_text_arguments(turns)
    if name == "smollm3":
        # It reads calls, thoughts and tools in contents and in a variable of its own.
        turns = [in_content(turn) for turn in trimmed(turns)]
        more = {"xml_tools": [json.dumps(tool["function"]) for tool in more["tools"]]} if more else {}
    if name == "gpt-oss":
        names = {"reasoning_content": "thinking"}
        turns = [{names.get(key, key): value for key, value in turn.items()} for turn in turns]
    return turns, more


def trimmed(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return turns without the white space at the ends of answers and thoughts, where reading takes it away."""
    return [
        {key: value.strip() if isinstance(value, str) else value for key, value in turn.items()}
        if turn["role"] == "assistant"
        else turn
        for turn in turns
    ]


def in_content(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn with its calls and thoughts in its content."""
    turn = dict(turn)
    thought = turn.pop("reasoning_content", None)
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in turn.pop("tool_calls", [])
    ]
    said = "\n".join([*filter(None, [turn["content"]]), *calls])
    return {**turn, "content": f"<think>\n{thought}\n</think>\n{said}" if thought else said}


@pytest.mark.parametrize("name", WRITTEN_BY_THE_MODELS_OWN)
def test_text_is_that_of_the_published_template(name, known):
    """A newline too many before a call, or a thought kept too long, is a model that is trained for another format."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    template = Template(find_template(known[0].path.parent, name), special)
    digest = hashlib.sha256()
    for number in range(40):
        turns, more = conversation(name, number)
        digest.update(template.render(turns, more).encode())
        digest.update(template.render(turns[:-1], more, add_generation_prompt=True).encode())
    assert digest.hexdigest()[:16] == WRITTEN_BY_THE_MODELS_OWN[name][1]


@pytest.mark.parametrize("name", WRITTEN_BY_THE_MODELS_OWN)
def test_ids_and_masks_are_those_of_transformers(name, known):
    """What is learnt ends with the token that ends the turn, and holds every answer that is written."""
    tokenizer, reference = known
    template = find_template(tokenizer.path.parent, name)
    template = template.replace("strftime_now('%Y-%m-%d')", "'2024-07-26'")
    template = template.replace("strftime_now('%d %B %Y')", "'26 July 2024'")
    ours = ChatFormat(tokenizer, template)
    for number in range(12):
        turns, more = conversation(name, number)
        if name in ("gpt-oss", "deepseek-v3"):
            # They drop what is said beside some calls: such a record is left out.
            turns = [{**turn, "content": ""} if "tool_calls" in turn else turn for turn in turns]
        expected = reference.apply_chat_template(
            turns, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **more
        )
        found = ours.encode_record(turns, more)
        assert found.ids.tolist() == expected["input_ids"]
        assert found.mask.tolist() == expected["assistant_masks"]
        learnt = tokenizer.decode(found.ids[found.mask == 1])
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        assert all(answer["content"].strip() in learnt for answer in answers)
        assert not any(
            turn["content"] in learnt
            for turn in turns
            if turn["role"] == "user" and len(turn["content"]) > 30
        )
        stops = sum(learnt.count(end) for end in ENDS.get(name, ("<|im_end|>",)))
        # GLM's last answer ends with whoever speaks next, and nobody does; gpt-oss ends thoughts too.
        assert stops == len(answers) - (name == "glm-4.5") or name == "gpt-oss"


@pytest.mark.parametrize("name", ["qwen-3", "qwen-3.5", "glm-4.5", "gpt-oss"])
def test_old_thoughts_are_learnt_behind_true_prefixes(name, known):
    """Templates of thinking models drop the thoughts of all answers but the last: these were never learnt."""
    tokenizer, _ = known
    turns = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1", "reasoning_content": "first thought"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "2", "reasoning_content": "second thought"},
    ]
    plain = load_chat_format(tokenizer, name).encode_record(turns)
    assert "first thought" not in tokenizer.decode(plain.ids)
    trees = load_chat_format(tokenizer, name, config=ChatConfig(true_prefixes=True))
    found = trees.encode_record(turns)
    learnt = tokenizer.decode(found.ids[found.mask == 1])
    assert len(found.parts) == 2 and "first thought" in learnt and "second thought" in learnt
    no_thoughts = ChatConfig(true_prefixes=True, train_thoughts=False)
    seen = load_chat_format(tokenizer, name, config=no_thoughts).encode_record(turns)
    assert seen.ids.tolist() == found.ids.tolist()
    assert "thought" not in tokenizer.decode(seen.ids[seen.mask == 1])


def test_thoughts_before_calls_are_in_the_true_prefix(known):
    """gpt-oss drops the thoughts before calls once the answer is there, which the model had when it wrote it: every
    trace of calls with thoughts was left out."""
    tokenizer, _ = known
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "<|end|>"}}}
    turns = [
        {"role": "user", "content": "one <|call|>?"},
        {"role": "assistant", "content": "", "reasoning_content": "call thought", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12 <|return|>"},
        {"role": "assistant", "content": "1", "reasoning_content": "last thought"},
    ]
    chat = load_chat_format(tokenizer, "gpt-oss", config=ChatConfig(true_prefixes=True))
    plain = load_chat_format(tokenizer, "gpt-oss")
    asked = plain.text(turns[:3], {}, asked=True)
    assert "call thought" in asked and "call thought" not in plain.text(turns, {})
    found = chat.encode_record(turns)
    assert found.parts is None and not found.notes
    tail = "<|channel|>analysis<|message|>last thought<|end|><|start|>assistant<|channel|>final<|message|>1<|return|>"
    assert tokenizer.decode(found.ids) == asked + tail
    learnt = tokenizer.decode(found.ids[found.mask == 1])
    assert learnt.startswith("<|channel|>analysis<|message|>call thought") and learnt.endswith(tail)
    assert "12 " not in learnt and learnt.count("<|call|>") == 1
    # What was said stays text: the ids are those of the prompt, and of the answer behind it.
    prompt = plain.encode_turns(turns[:3], {}).ids
    assert found.ids[: len(prompt)].tolist() == prompt.tolist()
    no_thoughts = ChatConfig(true_prefixes=True, train_thoughts=False)
    seen = load_chat_format(tokenizer, "gpt-oss", config=no_thoughts).encode_record(turns)
    assert seen.ids.tolist() == found.ids.tolist()
    assert "thought" not in tokenizer.decode(seen.ids[seen.mask == 1])


@pytest.mark.parametrize("wish", ["Short.", "Short. /no_think ", "/think", "Own. /system_override", None])
def test_calls_and_thoughts_of_smollm3(known, wish):
    """Its own template reads them in contents alone: from keys of their own the same text has to come. A switch in the
    system's turn is taken out of it, and such records were left out for that."""
    chat = load_chat_format(known[0], "smollm3")
    turns, more = conversation("smollm3", 7)
    kept, tools = random_chat(7, **ALL)
    kept = trimmed(kept)
    assert more and any("tool_calls" in turn for turn in kept) and any("reasoning_content" in t for t in kept)
    if wish is not None and "override" in wish:
        # Then the block says nothing of tools.
        more, tools = {}, {}
    first = [] if wish is None else [{"role": "system", "content": wish}]
    in_contents = chat.encode(first + [turn for turn in turns if turn["role"] != "system"], more)
    in_keys = chat.encode(first + [turn for turn in kept if turn["role"] != "system"], tools)
    assert in_keys.ids.tolist() == in_contents.ids.tolist()
    assert in_keys.mask.tolist() == in_contents.mask.tolist()
    text = known[0].decode(in_keys.ids)
    silent = wish is not None and "/no_think" in wish
    assert text.count("<think>\n\n</think>\n") == silent * sum(t["role"] == "assistant" for t in turns)
    assert ("Reasoning Mode: /no_think" in text) == silent
    assert text.startswith("<|im_start|>system\nOwn.<|im_end|>") == (not more)


def test_what_a_template_cannot_write_is_left_out(known):
    """Llama makes one call a turn, Gemma and Phi none: a record that says more is not learnt by half."""
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    turns = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "12 C"},
        {"role": "assistant", "content": "There."},
    ]
    for name in ("llama-3.1", "gemma-3", "phi-4"):
        with pytest.raises(MessagesError):
            load_chat_format(known[0], name).encode(turns)
