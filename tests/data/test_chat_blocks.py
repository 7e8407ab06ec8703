"""Templates with `{% generation %}` blocks: their masks are those of transformers, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.chat import ChatFormat
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.tokenizer import Tokenizer
from tests.data.chat_tokenizers import chatty_tokenizer, hugging_face, llama_like
from tests.data.random_chats import chat

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "a, b", "n": 3}}}
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!", "reasoning_content": "greet"},
    {"role": "user", "content": "Look\n"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "thinking": "let me"},
    {"role": "tool", "content": "12 C"},
    {"role": "assistant", "content": " So long "},
]
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
]

TURN = "{% for m in messages %}{% if m.role == 'assistant' %}ANSWER{% else %}OTHER{% endif %}{% endfor %}"
OTHER = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CALLS = (
    "{% if m.tool_calls %}{% for c in m.tool_calls %}\n<call>\n{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}\n</call>{% endfor %}{% endif %}"
)
THINK = "{% if m.reasoning_content is defined %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
LATE = (
    "{% if loop.last and m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}"
)


def spoken(*pieces: str) -> str:
    """Return a template whose answers are these pieces; a piece that begins with ! stands outside of blocks."""
    answer = "".join(
        piece[1:] if piece.startswith("!") else f"{{% generation %}}{piece}{{% endgeneration %}}"
        for piece in pieces
    )
    return TURN.replace("ANSWER", answer).replace("OTHER", OTHER)


HEAD = "!<|im_start|>assistant\n"
STRUCTURES = {
    # What publishers of training templates do: each a structure of its own, the text written anew.
    "eos in, newline out": spoken(HEAD, THINK + "{{ m.content }}" + CALLS + "<|im_end|>", "!\n"),
    "newline and eos in": spoken(HEAD, THINK + "{{ m.content }}" + CALLS + "<|im_end|>\n"),
    "eos out": spoken(HEAD, THINK + "{{ m.content }}" + CALLS, "!<|im_end|>\n"),
    "newline, then eos": spoken(HEAD, THINK + "{{ m.content }}" + CALLS + "\n<|im_end|>", "!\n"),
    "text first": spoken("!<|im_start|>assistant", "\n" + THINK + "{{ m.content }}" + CALLS + "<|im_end|>"),
    "header in": spoken("<|im_start|>assistant\n" + THINK + "{{ m.content }}" + CALLS + "<|im_end|>"),
    "two blocks": spoken(HEAD, THINK + "{{ m.content }}", "!<|eot_id|>", CALLS + "<|im_end|>", "!\n"),
    "thought, content, calls": spoken(HEAD, THINK, "{{ m.content }}", CALLS, "<|im_end|>", "!\n"),
    "thoughts outside": spoken(HEAD, "!" + THINK, "{{ m.content }}" + CALLS + "<|im_end|>"),
    "content outside": spoken(HEAD, "!" + THINK + "{{ m.content }}" + CALLS, "<|im_end|>"),
    "only calls": spoken(HEAD, "!" + THINK + "{{ m.content }}", CALLS, "!<|im_end|>\n"),
    "late thoughts": spoken(HEAD, LATE + "{{ m.content }}" + CALLS + "<|im_end|>"),
    "trimmed": spoken(HEAD, THINK + "{{ m.content | trim }}" + CALLS + "<|im_end|>"),
    "headers of three tokens": spoken(
        "!<|start_header_id|>assistant<|end_header_id|>\n\n", THINK + "{{ m.content | trim }}" + CALLS + "<|eot_id|>"
    ),
    "channels": spoken(
        "!<|start_header_id|>assistant",
        "{% if m.thinking is defined %}<|end_header_id|>analysis{{ m.thinking }}<|eot_id|>"
        "<|start_header_id|>assistant{% endif %}",
        "<|end_header_id|>final{{ m.content }}" + CALLS + "{% if loop.last %}</s>{% else %}<|eot_id|>{% endif %}",
    ),
    "brackets": "{{ bos_token }}"
    + spoken("! ", THINK + "{{ m.content }}" + CALLS + "{{ eos_token }}").replace(
        OTHER, "[INST] {{ m.content }} [/INST]"
    ),
    "tools above": "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + spoken(HEAD, THINK + "{{ m.content }}" + CALLS + "<|im_end|>", "!\n"),
    "one block over the whole loop": "{% generation %}" + spoken(HEAD + THINK + "{{ m.content }}" + CALLS)[
        : -len("{% endfor %}")
    ].replace("{% generation %}", "").replace("{% endgeneration %}", "").replace("!<", "<")
    + "{% endfor %}{% endgeneration %}",
    "merged keys": spoken(HEAD, "{{ (m.reasoning_content or '') ~ m.content }}" + CALLS + "<|im_end|>"),
    "prefilled": spoken(HEAD + "<think>\n", THINK + "{{ m.content }}" + CALLS + "<|im_end|>"),
    "last answer alone": spoken("!<|im_start|>assistant\n").replace(
        "assistant\n{% else",
        "assistant\n{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}" + THINK + "{{ m.content }}" + CALLS + "<|im_end|>{% endif %}{% else",
    ),
    "in a macro": "{% macro say(m) %}{% generation %}" + THINK + "{{ m.content }}" + CALLS
    + "<|im_end|>{% endgeneration %}{% endmacro %}" + spoken(HEAD + "{{ say(m) }}"),
    "wants tools": "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}{{ tools[0].function.name }}"
    + spoken(HEAD, THINK + "{{ m.content }}" + CALLS + "<|im_end|>", "!\n"),
    "dashes": "{%- for m in messages -%}\n  {%- if m.role == 'assistant' -%}\n    {{- '<|im_start|>assistant\n' -}}\n"
    "    {%- generation -%}\n    " + THINK.replace("{%", "{%-").replace("{{", "{{-") + "{{- m.content -}}" + CALLS
    + "{{- '<|im_end|>' -}}\n    {%- endgeneration -%}\n    {{- '\n' -}}\n  {%- else -%}\n    "
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}\n  {%- endif -%}\n{%- endfor -%}\n",
    "results side by side": spoken(HEAD, THINK + "{{ m.content }}" + CALLS + "<|im_end|>", "!\n").replace(
        OTHER, "{% if m.role != 'tool' %}" + OTHER + "{% else %}"
        "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}\n<got>\n{{ m.content }}\n</got>"
        "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}{% endif %}",
    ),
    "another role": "{{ bos_token }}"
    + spoken("!<|im_start|>model\n", THINK + "{{ m.content | trim }}" + CALLS + "<|im_end|>\n").replace(
        OTHER, "<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    ),
    "ends with who speaks next": "<|im_start|>" + spoken(
        "!assistant\n", THINK + "{{ m.content }}" + CALLS + "{% if not loop.last %}<|im_start|>{% endif %}",
    ).replace(OTHER, "{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_start|>{% endif %}"),
    "arguments as XML": spoken(
        HEAD, THINK + "{{ m.content }}{% for c in m.tool_calls or [] %}\n<call={{ c.function.name }}>"
        "{% for k, v in c.function.arguments | items %}\n<arg={{ k }}>\n{{ v if v is string else v | tojson }}\n</arg>"
        "{% endfor %}\n</call>{% endfor %}<|im_end|>", "!\n",
    ),
    "calls in turns of their own": spoken(
        "!{% if m.content or m.reasoning_content is defined %}" + HEAD[1:],
        THINK + "{{ m.content }}<|im_end|>",
        "!{% endif %}{% for c in m.tool_calls or [] %}<|im_start|>assistant to={{ c.function.name }}\n",
        "{{ c.function.arguments | tojson }}<|eot_id|>",
        "!{% endfor %}",
    ),
}  # fmt: skip
WRONG_IN_TRANSFORMERS = ("in a macro",)
"""It takes what a macro wrote to stand where the macro began to be asked: there ours is checked by its text."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    folder = tmp_path_factory.mktemp("blocks")
    made = {
        "bytes": chatty_tokenizer(folder / "bytes"),
        "legacy": llama_like(folder / "legacy", legacy=True),
        "first": llama_like(folder / "first", legacy=False),
    }
    return {name: (tokenizer, hugging_face(tokenizer)) for name, tokenizer in made.items()}


def assert_same(
    ours: ChatFormat, reference: Any, turns: list[dict[str, Any]], more: dict[str, Any] | None = None
) -> None:
    found = ours.encode(turns, more)
    expected = reference.apply_chat_template(
        turns,
        chat_template=ours.template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **(more or {}),
    )
    assert found.ids.tolist() == expected["input_ids"]
    assert found.mask.tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("name", sorted(set(STRUCTURES) - {*WRONG_IN_TRANSFORMERS}))
def test_masks_of_published_structures(known, name):
    """Plain text in a block once ended what was learnt, and ten of 25 such templates were refused as unsound."""
    assert len(STRUCTURES) - len(WRONG_IN_TRANSFORMERS) >= 25
    for place, (tokenizer, reference) in enumerate(known.values()):
        ours = ChatFormat(tokenizer, STRUCTURES[name])
        assert_same(ours, reference, TALK, {"tools": TOOLS} if "tools" in name else None)
        for number in range(2 * place, 2 * place + 2):
            turns, more = chat(number, tools=True, parallel=True, thoughts=True, text_beside_calls=True)
            if "tools" not in name:
                more = {}
            elif not more:
                continue
            assert_same(ours, reference, turns, more)


def test_a_block_in_a_macro_is_where_its_text_is(known):
    """A macro writes at once what was put together elsewhere: counting what was written before is then wrong."""
    tokenizer, _ = known["bytes"]
    ids, mask = ChatFormat(tokenizer, STRUCTURES["in a macro"]).encode(TALK[:2])
    assert tokenizer.decode(ids[mask == 1]) == "<think>\ngreet\n</think>\n\nHello!<|im_end|>"


pieces = st.sampled_from(
    [
        *(
            "{{ m.content }}",
            "{{ m.content | trim }}",
            "{{ '\n' + m.content }}",
            "{{ m.content }}",
            CALLS,
            THINK,
        ),
        *("<|im_end|>", "</s>", "\n", " ", "\n\n", ": ", "said", "\u00e9", "<think>", "{{ eos_token }}", ""),
        *("{%- if true -%}\n x {%- endif -%}", "{% if loop.last %}<|eot_id|>{% else %}.\n{% endif %}"),
    ]
)
blocks = st.lists(pieces, max_size=4).map("".join)
between = st.sampled_from(["!", "!\n", "! ", "!<|im_end|>\n", "!</s>", "!so ", "!\u00e9\n"])
texts = st.lists(
    st.sampled_from([*"abc .\n", "  ", "Hello", "\u4e2d", "\u00e9", "</think>", "x\n\ny"]),
    min_size=1,
    max_size=6,
).map("".join)


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": draw(texts)}
    if draw(st.booleans()):
        turn[draw(st.sampled_from(["reasoning_content", "thinking", "reasoning"]))] = (
            "hm " + draw(texts).strip()
        )
    if draw(st.booleans()):
        turn["tool_calls"] = [CALL] * draw(st.integers(1, 2))
    return turn


@st.composite
def talks(draw: st.DrawFn) -> list[dict[str, Any]]:
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(texts)}, draw(answers())]
    return turns


@given(
    kind=st.sampled_from(["bytes", "legacy", "first"]),
    first=blocks,
    second=blocks,
    rest=st.tuples(between, between, between),
    turns=talks(),
)
@settings(max_examples=60, deadline=None)
def test_masks_of_random_templates(known, kind, first, second, rest, turns):
    """Borders are easily off by a token: white space, ends of turns in or out of a block, blocks that say nothing."""
    tokenizer, reference = known[kind]
    # All that a turn says is written somewhere: what is not would be refused.
    template = spoken(HEAD + rest[0][1:], first, rest[1], THINK + "{{ m.content }}" + CALLS + second, rest[2])
    assert_same(ChatFormat(tokenizer, template), reference, turns)


def learnt(tokenizer: Tokenizer, template: str, turns: list[dict[str, Any]]) -> str:
    ids, mask = ChatFormat(tokenizer, template).encode(turns)
    return tokenizer.decode(np.asarray(ids)[np.asarray(mask) == 1])


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"masked": True}, {"weight": 0.0}, {"train": "false"}]
)
@pytest.mark.parametrize(
    "name", ["eos in, newline out", "two blocks", "thought, content, calls", "text first"]
)
def test_turns_that_are_not_to_be_learnt(known, name, mark):
    """A wrong answer that is kept for its correction would be learnt like any other."""
    tokenizer, _ = known["bytes"]
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "WRONG", "reasoning": "BAD", **mark},
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "RIGHT", "weight": 1},
    ]
    found = learnt(tokenizer, STRUCTURES[name], turns)
    assert "RIGHT" in found and "WRONG" not in found and "BAD" not in found
    assert found.count("<|im_end|>") == 1 and "<think>" not in found


@pytest.mark.parametrize("name", ["eos in, newline out", "thought, content, calls", "no blocks"])
def test_which_turns_and_thoughts_are_learnt(known, name):
    """All answers were learnt, whatever was wanted; thoughts could not be read without being learnt."""
    tokenizer, _ = known["bytes"]
    template = STRUCTURES["eos in, newline out"]
    if name == "no blocks":
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        template += "{% if add_generation_prompt %}" + HEAD[1:] + "{% endif %}"
    else:
        template = STRUCTURES[name]
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "ONE", "reasoning_content": "hm", "weight": 1},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [CALL], "train": False},
        {"role": "tool", "content": "12 C"},
        {"role": "assistant", "content": "<think>well</think>TWO"},
    ]

    def found(**config: Any) -> str:
        ids, mask = ChatFormat(tokenizer, template, config=ChatConfig(**config)).encode(turns)
        return tokenizer.decode(ids[mask == 1])

    one, two = "<think>\nhm\n</think>\n\nONE<|im_end|>", "<think>\nwell\n</think>\n\nTWO<|im_end|>"
    assert found() == one + two
    assert found(train_turns="last") == two
    assert found(train_turns="marked") == one
    assert found(train_thoughts=False) == "ONE<|im_end|>TWO<|im_end|>"
    turns[3] = {**turns[3], "train": True}
    call = found(train_thoughts=False).removeprefix("ONE<|im_end|>").removesuffix("TWO<|im_end|>")
    assert call.lstrip().startswith("<call>\nlook")
    assert found(train_turns="marked", train_thoughts=False) == "ONE<|im_end|>" + call
