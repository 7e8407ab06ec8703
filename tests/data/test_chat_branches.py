"""Records with branches: what they begin with is tokenised and counted once, and each is as it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.chat import ChatFormat
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.chat.encoder import Rendered
from longspan.data.chat.format import TOKENISED_WHOLE
from longspan.data.tokenizer import Tokenizer
from tests.data.chat_tokenizers import chatty_tokenizer, llama_like

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'user') | list %}"
    "{% if m.reasoning_content and not later %}<think>{{ m.reasoning_content }}</think>{% endif %}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Thoughts before the last question are dropped."""


class CountingModel:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, chat: ChatFormat) -> None:
        self.characters = 0
        self._model = chat._encoder._model
        chat._encoder._model = self

    def encode(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._model.encode(text, **options)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "bytes": chatty_tokenizer(folder / "bytes"),
        "legacy": llama_like(folder / "legacy", legacy=True),
        "first": llama_like(folder / "first", legacy=False),
    }


def asked(text: str, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    exchanges = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n} it is."}]
        for n in range(count)
    ]
    return [{"role": "user", "content": text}], {"branches": exchanges}


@pytest.mark.parametrize("ways", [{}, {"true_prefixes": True}, {"max_tokens": 9300}])
def test_what_branches_begin_with_is_tokenised_once(tokenizers, ways):
    """A text with n questions was tokenised n times: minutes a record of 128K tokens with 50 of them."""
    messages, values = asked("so long, hello there. " * 900, 30)
    chat = ChatFormat(tokenizers["bytes"], CHATML, config=ChatConfig(**ways))
    counting = CountingModel(chat)
    encoded = chat.encode_all(messages, values)
    text = len(messages[0]["content"])
    assert text < counting.characters < text + 30 * 300
    assert all(TOKENISED_WHOLE not in each.notes for each in encoded)


def test_a_text_that_cannot_be_cut_is_tokenised_whole_and_counted(tokenizers):
    """Nothing is known of how this tokenizer merges over a border, so that ids would differ."""
    messages, values = asked("so long, hello there." * 300, 4)
    chat = ChatFormat(tokenizers["first"], CHATML)
    counting = CountingModel(chat)
    (encoded,) = chat.encode_all(messages, values)
    assert counting.characters > 4 * len(messages[0]["content"])
    assert encoded.notes[TOKENISED_WHOLE] == 3
    # A turn before the border, of which it is known.
    (encoded,) = chat.encode_all([*messages, {"role": "assistant", "content": "So."}], values)
    assert TOKENISED_WHOLE not in encoded.notes


def test_what_many_branches_learn_weighs_as_much_as_a_store_can_hold(tokenizers):
    """A weight is a byte: what 256 answers to one question begin with was learnt 0 times, without a word."""
    chat = ChatFormat(tokenizers["bytes"], CHATML)
    answers = [[{"role": "assistant", "content": "so"}]] * 256
    found = chat.encode_record([{"role": "user", "content": "Hi."}], {"branches": answers})
    assert found.mask.tolist()[-3:] == [255, 255, 0]
    assert found.notes["tokens that more than 255 branches learn, which weigh 255"] == 3
    found = chat.encode_record([{"role": "user", "content": "Hi."}], {"branches": answers[1:]})
    assert found.mask.tolist()[-3:] == [255, 255, 0] and "weigh" not in str(found.notes)


def test_branches_of_which_nothing_is_written(tokenizers):
    """They ended the job with a traceback."""
    chat = ChatFormat(
        tokenizers["bytes"],
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    )
    silent, said = ([{"role": "assistant", "content": text}] for text in ("", "so"))
    name = "conversations of which the chat template writes nothing"
    (found,) = chat.encode_all([], {"branches": [silent, said, silent]})
    assert found.notes[name] == 2 and len(found.ids) == 2 and found.parts is None
    (found,) = chat.encode_all([], {"branches": [silent, said, [*said, *said]]})
    assert found.notes[name] == 1 and found.parts.tolist() == [[0, 0, 0], [2, 0, 1]]
    (found,) = chat.encode_all([], {"branches": [silent, silent]})
    assert not len(found.ids)


WORDS = ["so", " long", "  ", "\n", " Be", ".", "\u4e2d\u3002", "e\u0301 a", "12", "<|im_end|>", "\t"]


@given(
    kind=st.sampled_from(["bytes", "legacy", "first"]),
    begin=st.lists(st.sampled_from(WORDS), min_size=5, max_size=40).map("".join),
    ends=st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map("".join), min_size=2, max_size=4),
    share=st.floats(0, 1),
)
@settings(max_examples=25, deadline=None)
def test_ids_and_masks_are_those_of_each_text_alone(tokenizers, kind, begin, ends, share):
    """A cut between characters that a tokenizer merges, or white space that a special token takes in."""
    encoder = ChatFormat(tokenizers[kind], CHATML)._encoder
    texts = []
    for end in ends:
        text, (start, stop) = encoder.marked(begin + end, [int(share * len(begin)), len(begin + end)])
        texts.append(Rendered(text, [(start, stop)] if start < stop else [], {}))
    for blocks in (False, True):
        found, _ = encoder.encode_alike(texts, blocks=blocks)
        for text, each in zip(texts, found):
            (alone,), _ = encoder.encode_alike([text], blocks=blocks)
            assert each.ids.tolist() == alone.ids.tolist() and each.mask.tolist() == alone.mask.tolist()


def test_notes_of_what_branches_begin_with_count_once(tokenizers):
    """A turn before the border was counted for each branch: ten times what was lost."""
    call = {"type": "function", "function": {"name": "look", "arguments": "[1]"}}
    before = [
        {"role": "user", "content": "Hi.", "odd": 1},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."},
        {"role": "user", "content": "A text. ", "odd": 1},
    ]
    questions = [
        [{"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": "So.", "odd": 1}]
        for n in range(3)
    ]
    chat = ChatFormat(tokenizers["bytes"], CHATML)
    notes = chat.encode_record(before, {"branches": questions, "loss": 0.5}).notes
    assert notes["turns whose thoughts the chat template leaves out"] == 1
    assert notes["turns with a `odd`, which the chat template does not read"] == 2 + 3
    assert notes["records with a `loss` that says nothing of turns"] == 1
    # Of a table, whose turns have the keys of all.
    table = [[{**ask, "odd": None}, {**answer, "name": None}] for ask, answer in questions]
    assert chat.encode_record(before, {"branches": table, "loss": 0.5}).notes == notes
    # What the question says of itself is its own.
    own = [[{**ask, "odder": 1}, answer] for ask, answer in questions]
    notes = chat.encode_record(before, {"branches": own}).notes
    assert notes["turns with a `odder`, which the chat template does not read"] == 3
    calling = ChatFormat(
        tokenizers["bytes"],
        CHATML.replace(
            "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
        ),
        config=ChatConfig(truncate_tool_results="5"),
    )
    results = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "so long, " * 9},
    ]
    said = [[{"role": "assistant", "content": word}] for word in ("a", "b")]
    notes = calling.encode_record(results, {"branches": said}).notes
    assert notes["calls whose arguments are no JSON object"] == 1
    assert notes["results of tools that were shortened"] == 1
