"""When answers end, what is shown of them as they come, other kernels and types, and the closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.published_grids import LLAMA_2_7B, PUBLISHED_GRIDS, reuse_factor
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.data.tokenizer import train_bpe
from longspan.infer.answer_stream import AnswerStream
from longspan.infer.flops import (
    GridPrompt,
    ModelFlops,
    ladder,
    work_by_themselves,
    work_shared,
)
from longspan.infer.local import LocalAnswerer
from longspan.infer.plain import PlainAnswerer, finished
from longspan.kernels.attention.reference import ReferenceKernel
from longspan.models.hf import build_model
from tests.infer.engines import (
    MODELS,
    Bytes,
    assert_same,
    grid,
    in_order,
    local,
    model_of,
    plain,
    random_ids,
    request,
)

PROMPTS = grid([40, 25], [0.0, 0.5, 1.0])


def say(text: str, *, on_text: Any = None, tokenizer: Any = None, **fields: Any) -> AnswerStream:
    """Push the bytes of a text until the answer ends."""
    stream = AnswerStream(
        request([1], **{"max_new_tokens": 100, **fields}), tokenizer or Bytes(), on_text=on_text
    )
    for token in text.encode():
        if stream.push(token):
            break
    return stream


def test_a_stop_text_is_found_over_the_borders_of_tokens() -> None:
    """Each of its letters is a token here; neither it nor what follows is part of the answer."""
    stream = say("one\n\ntwo", stop=("\n\n",))
    assert stream.finish == "stop"
    assert bytes(stream.ids) == b"one\n\n"
    answer = finished(request([1], stop=("\n\n",)), np.array(stream.ids), Bytes(), seconds=0.0)  # type: ignore[arg-type]
    assert (answer.text, answer.finish) == ("one", "stop")


def test_the_first_of_several_stop_texts_counts() -> None:
    """Also where it is the later one in the list, or both come with one token."""
    assert bytes(say("abc", stop=("c", "b")).ids) == b"ab"
    assert say("abc", stop=("x", "")).finish is None
    whole = finished(request([1], stop=("x", "")), np.array([97, 98]), Bytes(), seconds=0.0)  # type: ignore[arg-type]
    assert (whole.text, whole.finish) == ("ab", "length")  # an empty text ends nothing


def test_length_and_stop_ids() -> None:
    """The token that stops is part of the ids; the last token that is allowed may be it."""
    assert (say("abc", max_new_tokens=2).finish, say("abc", max_new_tokens=2).ids) == ("length", [97, 98])
    assert say("abc", max_new_tokens=2, stop_ids=(98,)).finish == "stop"


def test_what_is_shown_is_never_taken_back() -> None:
    """The beginning of a stop text and of a character wait until it is clear what becomes of them."""
    pieces: list[str] = []
    say("a-- b--- c", stop=("---",), on_text=pieces.append)
    assert "".join(pieces) == "a-- b"
    pieces.clear()
    stream = say("gr\u00fc\u00df \U0001f600!", on_text=pieces.append)
    assert pieces == ["g", "r", "\u00fc", "\u00df", " ", "\U0001f600", "!"]
    assert stream.finish is None
    pieces.clear()
    say("\u00fc", max_new_tokens=1, on_text=pieces.append)
    assert pieces == ["\ufffd"]  # half a character at the very end is shown as it is decoded
    pieces.clear()
    say("ab-", stop=("--",), max_new_tokens=3, on_text=pieces.append)
    assert "".join(pieces) == "ab-"
    pieces.clear()
    say("ab\x00", stop_ids=(0,), on_text=pieces.append)
    assert "".join(pieces) == "ab"


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("ab\u00fc\u20ac\U0001f600\n", max_size=20),
    stop=st.lists(st.text("ab\u00fc\n", min_size=1, max_size=3), max_size=2),
)
def test_pieces_join_to_the_answer(text: str, stop: list[str]) -> None:
    """Shown and recorded text are the same, for every stop text."""
    pieces: list[str] = []
    fields: dict[str, Any] = {"stop": tuple(stop), "max_new_tokens": len(text.encode())}
    stream = say(text, on_text=pieces.append, **fields)
    answer = finished(request([1], **fields), np.array(stream.ids), Bytes(), seconds=0.0)  # type: ignore[arg-type]
    # A longer stop text that began earlier may never have come to its end.
    said = bytes(stream.ids).decode()
    end = min([place for one in stop if (place := said.find(one)) >= 0], default=len(text))
    assert "".join(pieces) == answer.text == text[:end]
    if text:
        assert stream.finish == answer.finish


def test_pieces_of_a_real_tokenizer_join_to_the_answer(tmp_path: Path) -> None:
    """Byte-level BPE cuts characters anywhere."""
    text = "Gr\u00fc\u00dfe aus \u6771\u4eac, 12 \U0001f600 mal. " * 3
    tokenizer = train_bpe([text * 20], tmp_path, vocab_size=290)
    pieces: list[str] = []
    ids = tokenizer.encode(text).tolist()
    stream = AnswerStream(request([1], max_new_tokens=len(ids)), tokenizer, on_text=pieces.append)
    assert [stream.push(token) for token in ids][-1] == "length"
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert len(pieces) > 20


def test_answers_stream_as_they_come() -> None:
    """The same answer as without a listener, in pieces, the first one before the last token."""
    ids = random_ids(5, 30)
    pieces: list[str] = []
    answer = local("llama").generate_stream(request(ids, max_new_tokens=20), pieces.append)
    assert_same([answer], in_order(plain("llama").generate([request(ids, max_new_tokens=20)])))
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3
    again: list[str] = []
    assert plain("llama").generate_stream(request(ids, max_new_tokens=20), again.append).text == answer.text
    assert again == pieces


@pytest.mark.both_kernels
@pytest.mark.parametrize("limit", [10_000, 20])
def test_answers_that_end_at_different_times(limit: int) -> None:
    """Whoever goes on keeps its own keys when others leave the batch."""
    free = in_order(plain("qwen").generate([request(ids, max_new_tokens=9) for ids in PROMPTS]))
    requests = []
    for n, (ids, answer) in enumerate(zip(PROMPTS, free)):
        assert answer.token_ids is not None
        stop = int(answer.token_ids[n + 1])
        letter = bytes([stop]).decode("latin-1") if stop < 128 else "@"
        fields: dict[str, Any] = {"stop_ids": (stop,)} if n % 2 else {"stop": (letter,)}
        requests.append(request(ids, max_new_tokens=9, **fields))
    ours = in_order(local("qwen", cache_tokens=limit).generate(requests))
    assert_same(ours, in_order(plain("qwen").generate(requests)))
    assert len({answer.completion_tokens for answer in ours}) > 2
    assert {answer.finish for answer in ours} >= {"stop"}


@pytest.mark.both_kernels
@pytest.mark.parametrize("shared", [0, 20])
def test_what_waits_is_written_beside_answers_that_go_on(shared: int, held: list[int]) -> None:
    """A batch whose last answer was long went on alone while the next waited; more was held than is allowed."""
    # Three groups that may begin alike, of four prompts each, of which one has a long answer.
    requests = [
        request(random_ids(n // 4, shared) + [n, 7, 8], max_new_tokens=33 if n % 4 == 0 else 3)
        for n in range(12)
    ]
    answerer = local("qwen", cache_tokens=shared + 4 * 48)
    assert_same(in_order(answerer.generate(requests)), in_order(plain("qwen").generate(requests)))
    assert answerer.counters.decoded_tokens == 3 * 32 + 9 * 2
    assert answerer.counters.passes < 2 * 32 + 6  # one group behind the other takes 3 * 33
    assert max(held) <= shared + 4 * 48


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen"])
def test_a_dense_kernel_gives_the_same_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices without a flash kernel: a mask of all pairs, over keys that several bands read."""
    from longspan.infer import engine

    expected = in_order(plain(name).generate([request(ids, max_new_tokens=4) for ids in PROMPTS]))
    monkeypatch.setattr(engine, "choose_kernel", lambda device: ReferenceKernel())
    answerer = local(name, batch_tokens=30)
    assert_same(in_order(answerer.generate([request(ids, max_new_tokens=4) for ids in PROMPTS])), expected)


@pytest.mark.both_kernels
def test_narrow_types_are_kept_wide_where_the_kernel_computes_wide() -> None:
    """bf16 keys that are cast for every query cost more than memory; on CUDA they stay narrow, and parts are wide."""
    model = build_model(MODELS["llama"], seed=3).eval().to(torch.bfloat16)
    requests = [request(ids, answer_ids=np.array([5, 6])) for ids in PROMPTS]
    options: dict[str, Any] = {"identity": {}, "batch_tokens": 50}
    ours = in_order(LocalAnswerer(model, Bytes(), **options).score(requests))  # type: ignore[arg-type]
    theirs = in_order(PlainAnswerer(model, Bytes(), **options).score(requests))  # type: ignore[arg-type]
    for our, their in zip(ours, theirs):
        assert our.nll is not None
        np.testing.assert_allclose(our.nll, their.nll, rtol=0.02, atol=0.05)


def test_costs_are_those_of_the_parameters() -> None:
    """Two operations for each weight of the blocks' linear layers, whatever the heads."""
    for name in ("llama", "mha", "qwen"):
        model = model_of(name)
        weights = sum(
            module.weight.numel()
            for layer in model.model.layers
            for module in layer.modules()
            if isinstance(module, torch.nn.Linear)
        )
        assert ModelFlops.of(model.config).per_token == 2 * weights
        assert ModelFlops.of(model.config).per_logit_row == 2 * model.lm_head.weight.numel()


def test_closed_forms_by_hand() -> None:
    """Two cells of three tokens, of which they share the first two, or the first one."""
    cells = [GridPrompt(2, 3), GridPrompt(1, 3)]
    assert work_by_themselves(cells) == (6, 12, 2)
    assert work_shared(cells) == (2 + 1 + 2, 3 + (6 - 3) + (6 - 1), 2)
    assert work_shared([]) == (0, 0, 0)


def test_factors_of_the_published_grids() -> None:
    """A ladder of 11 depths and 8 lengths needs half of the linear work; many questions on one context far less."""
    factor = reuse_factor(ladder(range(256, 2049, 256), [n / 10 for n in range(11)]), LLAMA_2_7B)
    assert factor.linear == pytest.approx(2 / (1 + 2 * 2048 / (11 * 9216)), rel=1e-3)
    assert factor.attention == pytest.approx(1.5, abs=0.05)
    assert [len(cells) for cells in PUBLISHED_GRIDS.values()] == [440, 400]
    easycontext = reuse_factor(PUBLISHED_GRIDS["easycontext"], LLAMA_2_7B)
    print(easycontext, reuse_factor(PUBLISHED_GRIDS["fu-2024"], LLAMA_2_7B))
    assert easycontext.linear == pytest.approx(1.98, abs=0.01)
    assert easycontext.attention < easycontext.all < easycontext.linear
    questions = [GridPrompt(2000, 2020)] * 11
    assert reuse_factor(questions, LLAMA_2_7B).linear > 9.9
