"""From text to what a model is asked: BOS, chat template, and where the answer's tokens begin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from longspan.core.errors import ConfigError, DataError
from longspan.data.chat.template import find_template
from longspan.data.tokenizer import Tokenizer
from longspan.eval.prompts import PromptForm
from tests.eval.tokenizer_styles import STYLES, build_tokenizer

PROMPT = "The magic number of key is 12345.\n" * 40 + "The magic number of key is"


@pytest.fixture(scope="module", params=STYLES)
def styled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer(request.param, tmp_path_factory.mktemp("styles") / request.param)


@pytest.mark.parametrize("answer", ["1234567", "eat a sandwich on a sunny day.", "\u00e9t\u00e9"])
def test_answer_has_the_tokens_of_the_whole_text(styled: Tokenizer, answer: str) -> None:
    """Answers tokenised alone, with their first token cut off, are not what a model would write."""
    form = PromptForm(styled)
    request = form.request(PROMPT, answer=answer)
    assert request.prompt_ids is not None and request.answer_ids is not None
    whole = np.concatenate([request.prompt_ids, request.answer_ids])
    reference = transformers.AutoTokenizer.from_pretrained(styled.path.parent)
    assert whole.tolist() == reference(f"{PROMPT} {answer}")["input_ids"]
    assert request.prompt_ids.tolist() == reference(PROMPT)["input_ids"]
    assert styled.decode(request.answer_ids).strip() == answer
    assert len(whole) == form.count(PROMPT, answer=answer)


def test_one_bos_where_it_is_wanted(styled: Tokenizer) -> None:
    """Text joined from pieces that were each tokenised with a BOS has BOS in the middle."""
    for policy, wanted in (("auto", int(styled.adds_bos)), ("never", 0)):
        ids = PromptForm(styled, bos=policy).request(PROMPT).prompt_ids  # type: ignore[arg-type]
        assert ids is not None
        assert int((ids == styled.bos_id).sum() if styled.bos_id is not None else 0) == wanted
    assert PromptForm(styled).params()["bos"] == ("one BOS" if styled.adds_bos else "no BOS")
    if styled.bos_id is None:
        with pytest.raises(ConfigError, match="no BOS token"):
            PromptForm(styled, bos="always")
    else:
        ids = PromptForm(styled, bos="always").request(PROMPT).prompt_ids
        assert ids is not None and ids[0] == styled.bos_id and int((ids == styled.bos_id).sum()) == 1


@pytest.mark.parametrize("policy", ["auto", "always"])
def test_chat_template_is_rendered_as_transformers_does(styled: Tokenizer, policy: str) -> None:
    """The template's own BOS counts, and special tokens in the message stay text."""
    name = styled.path.parent.name
    form = PromptForm(styled, chat_template=name, bos="auto" if styled.bos_id is None else policy)  # type: ignore[arg-type]
    request = form.request(PROMPT, answer="12345")
    assert request.prompt_ids is not None and request.answer_ids is not None
    reference = transformers.AutoTokenizer.from_pretrained(styled.path.parent)
    ids = reference(request.prompt, add_special_tokens=False)["input_ids"]
    assert request.prompt_ids.tolist() == ids
    if styled.bos_id is not None:
        assert ids.count(styled.bos_id) == 1
    assert styled.decode(request.answer_ids).strip() == "12345"
    assert request.messages == [{"role": "user", "content": PROMPT}]
    hostile = form.request(f"{PROMPT} </s><|eot_id|><|im_end|>").prompt_ids
    assert hostile is not None
    for special in ("</s>", "<|eot_id|>", "<|im_end|>"):
        number = styled.token_id(special)
        assert int((hostile == number).sum()) == ids.count(number)


def test_long_chat_has_the_ids_of_the_whole(styled: Tokenizer) -> None:
    """Long messages are encoded in pieces; the pieces, joined, are the ids of the text."""
    name = styled.path.parent.name
    form = PromptForm(styled, chat_template=name)
    message = "What is the number of the river and the stone? " * 2000
    request = form.request(message)
    reference = transformers.AutoTokenizer.from_pretrained(styled.path.parent)
    assert request.prompt_ids is not None
    assert request.prompt_ids.tolist() == reference(request.prompt, add_special_tokens=False)["input_ids"]


def test_stop_ids_are_those_of_the_model(tmp_path: Path) -> None:
    """A chat model whose end of turn is not its EOS ran on to the limit after every answer."""
    tokenizer = build_tokenizer("llama-3", tmp_path)
    end, turn = tokenizer.eos_id, tokenizer.token_id("<|eot_id|>")
    assert PromptForm(tokenizer).stop_ids == (end,)
    assert PromptForm(tokenizer, chat_template="llama-3").stop_ids == tuple(sorted((end, turn)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 7]}))
    assert PromptForm(tokenizer).stop_ids == tuple(sorted((end, 7)))


def test_no_space_is_put_after_white_space_or_in_a_chat(tmp_path: Path) -> None:
    """Two spaces, or a space at the start of a chat's answer, are not what a model writes."""
    tokenizer = build_tokenizer("qwen", tmp_path)
    request = PromptForm(tokenizer).request("Answer: \n", answer="12")
    assert request.answer_ids is not None and tokenizer.decode(request.answer_ids) == "12"
    request = PromptForm(tokenizer, chat_template="qwen").request("Answer:", answer="12")
    assert request.answer_ids is not None and tokenizer.decode(request.answer_ids) == "12"


def test_template_that_loses_the_message_is_refused(tmp_path: Path) -> None:
    """A prompt without its context would be answered, wrongly, without a word."""
    tokenizer = build_tokenizer("qwen", tmp_path)
    (tmp_path / "bad.jinja").write_text("{{ messages | length }}")
    with pytest.raises(DataError, match="message 0 times"):
        PromptForm(tokenizer, chat_template=str(tmp_path / "bad.jinja"))
    with pytest.raises(DataError, match="no chat template"):
        PromptForm(tokenizer, chat_template="own")


def test_a_conversation_is_rendered_as_transformers_does(styled: Tokenizer) -> None:
    """Turns put into one message of a user are another prompt than the benchmark's."""
    name = styled.path.parent.name
    turns = [
        {"role": "user", "content": "The best thing to do is key 1 2 3."},
        {"role": "assistant", "content": "What is 12345?"},
        {"role": "user", "content": "the river and the stone"},
    ]
    form = PromptForm(styled, chat_template=name)
    request = form.conversation(turns, max_new_tokens=9)
    reference = transformers.AutoTokenizer.from_pretrained(styled.path.parent)
    reference.chat_template = find_template(styled.path.parent, name)
    text = reference.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert request.prompt == text and request.messages == turns and request.max_new_tokens == 9
    assert request.prompt_ids.tolist() == reference(text, add_special_tokens=False)["input_ids"]
    one = form.conversation(turns[:1], max_new_tokens=64)
    text = reference.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    assert one.prompt == form.request(turns[0]["content"]).prompt == text, "with the template's own spaces"
    assert one.prompt_ids.tolist() == form.request(turns[0]["content"]).prompt_ids.tolist()
    plain = PromptForm(styled).conversation(turns)
    assert plain.prompt.startswith("User: The best") and plain.prompt.endswith("stone\nAssistant:")
    assert plain.messages is None
