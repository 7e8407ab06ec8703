"""What real models read and answer, against transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from longspan.data.rows.annotations import Annotations
from longspan.data.store import TokenStore
from longspan.data.tokenizer import load_tokenizer
from longspan.infer.packed import inference, packed_hidden_states
from longspan.infer.perplexity import token_nll
from longspan.models.hf import load_model

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def ids_of(model: Path, prose: Path, lengths: list[int]) -> list[np.ndarray]:
    """Beginnings of texts as a model reads them, with BOS where its tokenizer has one."""
    tokenizer = load_tokenizer(model)
    texts = [json.loads(line)["text"] for line in prose.read_text().splitlines()]
    found = [tokenizer.encode(text).astype(np.int64) for text in texts[: len(lengths)]]
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    return [np.array([*bos, *ids])[:length] for ids, length in zip(found, lengths)]


def alone(model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()


def test_smollm2_has_the_published_ids(smollm2: Path) -> None:
    """GGUF has no place for the digit splitter: "1984" would be one word that the model never saw."""
    tokenizer = load_tokenizer(smollm2)
    one_by_one = [int(tokenizer.encode(digit)[0]) for digit in "1984"]
    assert tokenizer.encode("1984").tolist() == one_by_one
    text = "It's 12.5% of 1,984 - naïve, 東京\n\n\tdef f(x):"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gemma3_begins_a_text_with_bos(gemma3: Path) -> None:
    """Without it Gemma reads a text at a nat more a token."""
    tokenizer = load_tokenizer(gemma3)
    assert tokenizer.adds_bos and tokenizer.bos_id == 2 and tokenizer.vocab_size == 262_144


class Alone(NamedTuple):
    """Two documents and what transformers makes of each by itself."""

    documents: list[np.ndarray]
    hidden: list[torch.Tensor]
    nll: list[np.ndarray]


@pytest.fixture(scope="module")
def by_transformers(model: Path, prose: Path) -> Alone:
    """Both longer than Gemma's window of 512."""
    plain = alone(model)
    found = Alone(ids_of(model, prose, [560, 640]), [], [])
    for document in found.documents:
        ids = torch.from_numpy(document)[None]
        with torch.no_grad():
            hidden = plain.model(ids).last_hidden_state
            logits = plain.lm_head(hidden)[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        found.hidden.append(hidden[0])
        found.nll.append(nll.numpy())
    return found


def test_losses_are_those_of_transformers(model: Path, by_transformers: Alone) -> None:
    """The way of `eval ppl`, with both RoPE bases of Gemma."""
    ours = token_nll(load_model(model).eval(), by_transformers.documents[1:], batch_tokens=4096)[0]
    expected = by_transformers.nll[1]
    assert 1.0 < expected.mean() < 4.0
    np.testing.assert_allclose(ours, expected, atol=5e-4)
    assert ours.mean() == pytest.approx(expected.mean(), abs=1e-4)


def test_packed_documents_are_those_alone(model: Path, by_transformers: Alone) -> None:
    """A window or a position that runs over the border of documents changes the second of them."""
    loaded = load_model(model).eval()
    with inference(loaded):
        packed = packed_hidden_states(loaded, by_transformers.documents).squeeze(0)
    for found, expected in zip(
        packed.split([len(each) for each in by_transformers.documents]), by_transformers.hidden
    ):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_annotations_are_the_likeliest_words(model: Path, prose: Path, tmp_path: Path, longspan) -> None:
    """Rows of a token store, their plan, and what a teacher predicts for them: through the commands."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prose.read_text().splitlines(keepends=True)[:1]))
    store, rows, taught = tmp_path / "store", tmp_path / "rows", tmp_path / "taught"
    for command in (
        f"data tokenize {few} --tokenizer {model} --out {store}",
        f"data pack {store} --length 128 --overflow drop_tail --out {rows}",
        f"annotate topk --model {model} --data {rows} --k 4 --out {taught}",
    ):
        outcome = longspan(command)
        assert outcome.code == 0, outcome.err
    tokenizer = load_tokenizer(model)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []  # the packing's own
    ids = np.array([*bos, *TokenStore(store).tokens(0).astype(np.int64)])[:128]
    known = Annotations(taught).row(0)
    with torch.no_grad():
        logits = alone(model)(torch.from_numpy(ids)[None]).logits[0]
    expected = logits.log_softmax(1).topk(4, 1)
    np.testing.assert_allclose(known.logprobs, expected.values.numpy(), atol=2e-2)
    assert (known.ids[:, 0] == expected.indices[:, 0].numpy()).mean() > 0.99


def test_smollm2_finds_needles_in_a_chat(smollm2: Path, prose: Path, tmp_path: Path, longspan) -> None:
    """Chat template, generated answers, stop ids and scores at once: at 1K it finds nearly all."""
    outcome = longspan(
        f"eval needle --model {smollm2} --data {prose} --chat-template own --lengths 1k --depths 0,0.5,1 "
        f"--samples 3 --out {tmp_path} --json"
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["scored"] == 9 and found["mean"] >= 0.75


def test_smollm2_answers_a_question(smollm2: Path, longspan) -> None:
    """In its own chat; a template that is off makes it ramble."""
    outcome = longspan(
        ["ask", str(smollm2), "--chat-template", "own", "--question", "What is the capital of France?",
         "--max-new-tokens", "16"]
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "Paris" in outcome.out
