"""Conversations as trees: each answer behind its true prefix, what they share once, the same losses and gradients."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from longspan.cli.main import app
from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.data.audit.audit_config import AuditConfig
from longspan.data.audit.job import audit
from longspan.data.chat import ChatFormat, MessagesError
from longspan.data.chat.branches import TokenTree, token_tree
from longspan.data.chat.chat_config import ChatConfig
from longspan.data.chat.true_prefixes import true_samples
from longspan.data.exchange.whole_stores import merge_stores
from longspan.data.jobs.local import LocalExecutor
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import plan_packing
from longspan.data.rows.loader import PackedRow, RowLoader
from longspan.data.store import TokenStore
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import Tokenizer
from longspan.data.verify import verify
from longspan.kernels.attention import Bands
from longspan.kernels.loss import IGNORE_LABEL
from longspan.models.hf import build_model, hidden_states
from longspan.models.recurrent import ChunkedRow
from longspan.models.tree_documents import TreeDocuments
from longspan.parallel.launch import spawn_local
from longspan.parallel.layout import LAYOUTS
from longspan.train.batch import Batch, collate, total_weight
from longspan.train.config import ParallelConfig, PoseConfig, TrainConfig
from longspan.train.pose import skip_positions
from longspan.train.recurrent import recurrent_step
from longspan.train.run_plan import plan_run
from longspan.train.spread import build_spread
from tests.data.chat_tokenizers import chatty_tokenizer
from tests.patience import PATIENCE_SECONDS

FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'user') | list %}"
    "{% if m.reasoning_content and not later %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Thoughts before the last question are dropped, as in most templates of thinking models."""


def trace(number: int, answers: int) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = [{"role": "system", "content": f"Rule {number}."}]
    for step in range(answers):
        turns.append(
            {"role": "tool" if step % 3 == 1 else "user", "content": f"Question {step} of {number}?"}
        )
        answer = {"role": "assistant", "content": f"It is {step * number}."}
        turns.append({**answer, "reasoning_content": f"I think of {step}."} if step % 4 != 3 else answer)
    return turns


TRACES = [trace(number, answers) for number, answers in ((1, 5), (2, 1), (3, 3))]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chatty_tokenizer(tmp_path_factory.mktemp("trees"))


@pytest.fixture(scope="module")
def store(chatty: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("trees")
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in TRACES))
    chat = ChatFormat(chatty, FORGETFUL, config=ChatConfig(true_prefixes=True))
    return tokenize_corpus([path], chatty, folder / "store", chat=chat)


def samples_of(chat: ChatFormat, turns: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return each answer as a row of its own, behind what the template writes when it is asked for."""
    found = []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            encoded = chat.encode_turns(turns[: number + 1], {}, learn=[number])
            found.append((encoded.ids, encoded.mask))
    return found


def loss_of(model: Any, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    hidden = hidden_states(model, batch.input_ids, batch.documents, position_ids=batch.positions)
    logits = model.lm_head(hidden)
    loss = torch.nn.functional.cross_entropy(
        logits, batch.labels, ignore_index=IGNORE_LABEL, reduction="none"
    )
    weights = torch.ones(len(loss)) if batch.loss_weights is None else batch.loss_weights
    total = (loss * weights.double()).sum()
    total.backward()
    return float(total.detach()), [parameter.grad.clone() for parameter in model.parameters()]


def row_of(ids: np.ndarray, mask: np.ndarray) -> PackedRow:
    one = np.zeros(1, np.uint16)
    borders = np.array([0, len(ids)], np.int32)
    return PackedRow(ids.astype(np.int64), borders, one.astype(np.uint32), one, ("a",), one > 0, mask)


def packed(store: TokenStore, length: int, **more: Any) -> RowLoader:
    spec = PackConfig(**{"length": length, "strategy": "best_fit", "remainder": "pad", "pad_id": 0, **more})
    return RowLoader(store, plan_packing(spec, store.lengths, np.arange(len(store)), 0))


def test_answers_stand_behind_their_true_prefixes(chatty, store):
    """Thoughts of all but the last answers were in no row, or behind thoughts that no model would have seen."""
    plain = ChatFormat(chatty, FORGETFUL)
    own = [sample for turns in TRACES for sample in samples_of(plain, turns)]
    assert store.branching.tolist() == [0, 2] and not verify(store.path).problems
    learnt = sum(int(store.mask(number).sum()) for number in range(3))
    assert learnt == sum(int(mask.sum()) for _, mask in own)
    # Two questions of the first trace are followed by others: its length, and twice an answer with its thoughts.
    ids, parts = store.tree_tokens(0), store.parts(0)
    ends = [*parts[1:, 0].tolist(), len(ids)]
    texts = [chatty.decode(ids[start:end]) for start, end in zip(parts[:, 0].tolist(), ends)]
    assert texts[0].startswith("<|im_start|>system\nRule 1.") and texts[0].count("<think>") == 1
    assert [text.count("<think>") for text in texts[1:]] == [1, 2]
    assert len(ids) < sum(len(sample) for sample, _ in samples_of(plain, TRACES[0])) / 2
    # Nothing is lost by them, so they are no warning.
    counts = store.manifest.counts
    assert (
        counts["remarks"]["tokens that branches share with what they branch off"] > 0 and not counts["notes"]
    )


def asked_apart(text: str, count: int) -> dict[str, Any]:
    branches = [
        [{"role": "user", "content": f" What is {n}?"}, {"role": "assistant", "content": f"{n} it is."}]
        for n in range(count)
    ]
    return {"messages": [{"role": "user", "content": text}], "branches": branches}


def test_questions_asked_apart_share_their_text(chatty, tmp_path):
    """Asked one after another, all but the first question of a text were learnt with answers before them; asked in
    records of their own, the text was read and stored for each."""
    text = "A long text. " * 40
    record = asked_apart(text, 5)
    alone = [
        [{"role": "user", "content": text + ask["content"]}, answer] for ask, answer in record["branches"]
    ]
    chat = ChatFormat(chatty, FORGETFUL)
    own = [chat.encode(turns) for turns in alone]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(record) + "\n")
    store = tokenize_corpus([path], chatty, tmp_path / "store", chat=chat)
    assert len(store) == 1 and len(store.tree_tokens(0)) < len(own[0].ids) + 4 * 40
    assert (
        store.manifest.counts["remarks"]["conversations that begin alike, as branches of one document"] == 4
    )
    torch.manual_seed(0)
    model = small_model(chatty.vocab_size, "llama")
    wanted = [loss_of(model, collate([row_of(*sample)])) for sample in own]
    rows = packed(store, 1024)
    found = loss_of(model, collate([rows.row(0)]))
    assert found[0] == pytest.approx(sum(loss for loss, _ in wanted), rel=1e-9)
    for number, gradient in enumerate(found[1]):
        torch.testing.assert_close(gradient, sum(each[number] for _, each in wanted), rtol=1e-5, atol=1e-7)


def test_answers_to_one_question_and_true_prefixes_in_branches(chatty):
    """Branches that begin with an answer are several answers; with true prefixes each branch is a tree itself."""
    question = {"role": "user", "content": "Which?"}
    branches = [[{"role": "assistant", "content": word}] for word in ("one", "two", "one")]
    chat = ChatFormat(chatty, FORGETFUL)
    found = chat.encode_record([question], {"branches": branches})
    assert len(found.parts) == 2 and found.mask.max() == 2
    with pytest.raises(MessagesError, match="branches"):
        chat.encode([question], {"branches": branches})
    both = ChatFormat(chatty, FORGETFUL, config=ChatConfig(true_prefixes=True))
    whole, shorter = TRACES[0], TRACES[0][:-2]
    tree = both.encode_record([], {"branches": [whole, json.dumps(shorter)]})
    samples = [(each.ids, each.mask) for part in (whole, shorter) for each in encoded_alone(both, part)]
    assert tree.ids.tolist() == token_tree(samples).ids.tolist()


def test_what_the_user_says_before_and_behind_the_border_is_one_turn(chatty):
    """In a table of JSON, or under another name of the user, text and question were two turns of a user's."""
    chat = ChatFormat(chatty, FORGETFUL)
    record = asked_apart("A text.", 2)
    wanted = chat.encode_record(record["messages"], {"branches": record["branches"]})
    questions = [[json.dumps(ask), answer] for ask, answer in record["branches"]]
    for text in (json.dumps(record["messages"][0]), {"role": " User", "content": "A text."}):
        found = chat.encode_record([text], {"branches": questions})
        assert found.ids.tolist() == wanted.ids.tolist()


def encoded_alone(chat: ChatFormat, turns: list[dict[str, Any]]) -> list[Any]:
    read, values, _ = chat.read(turns)
    answers = [number for number, turn in enumerate(read) if turn["role"] == "assistant"]
    return chat._alone(true_samples(chat, read, values, answers))


@pytest.mark.parametrize("too_long", ["cut", "split", "drop"])
def test_branches_that_do_not_fit_are_counted(chatty, too_long):
    """A record longer than there is room for went into the row whole, or lost questions unsaid."""
    record = asked_apart("Some words. " * 3, 6)
    own = len(ChatFormat(chatty, FORGETFUL).encode(record["messages"] + record["branches"][0][1:]).ids)
    chat = ChatFormat(chatty, FORGETFUL, config=ChatConfig(max_tokens=own + 70, too_long=too_long))
    branches = {"branches": record["branches"]}
    if too_long == "drop":
        with pytest.raises(MessagesError, match="max_tokens"):
            chat.encode_all(record["messages"], branches)
        return
    found = chat.encode_all(record["messages"], branches)
    assert all(len(each.ids) <= own + 70 for each in found)
    kept = sum(1 if each.parts is None else len(each.parts) for each in found)
    left_out = found[0].notes["branches left out, longer than max_tokens"]
    assert all(found[0].notes.values())
    assert kept + left_out == 6 and (len(found) == 1 and left_out > 0 if too_long == "cut" else kept == 6)
    long = {"branches": [*record["branches"], asked_apart("", 1)["branches"][0][:1] * 30]}
    assert (
        sum(
            each.notes["branches left out, longer than max_tokens"]
            for each in chat.encode_all(record["messages"], long)
        )
        == left_out + 1
    )


@pytest.mark.parametrize("wrong", [[], "x", [[]], ["[]"], [3], {"a": 1}, "[", [[3]]])
def test_wrong_branches_are_one_counted_record(chatty, wrong):
    """They were read over, and the record learnt without its answers."""
    with pytest.raises(MessagesError):
        ChatFormat(chatty, FORGETFUL).encode_all([{"role": "user", "content": "a"}], {"branches": wrong})


def small_model(vocab_size: int, model_type: str) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    window = {"sliding_window": 37} if model_type == "mistral" else {}
    fields = {"model_type": model_type, "vocab_size": vocab_size, "max_position_embeddings": 4096}
    return build_model({**fields, **sizes, **window, "num_key_value_heads": 1}, seed=0).double().train()


@pytest.fixture(scope="module", params=["llama", "mistral"])
def separately(request, chatty) -> tuple[Any, float, list[torch.Tensor]]:
    """Return a model, and loss and gradients of every answer as a row of its own."""
    model = small_model(chatty.vocab_size, request.param)
    plain = ChatFormat(chatty, FORGETFUL)
    own = [row_of(*sample) for turns in TRACES for sample in samples_of(plain, turns)]
    assert len(own) == 9
    found = [loss_of(model, collate([row])) for row in own]
    gradients = [sum(parts) for parts in zip(*(gradients for _, gradients in found))]
    return model, sum(loss for loss, _ in found), gradients


def rows_of(store: TokenStore) -> list[PackedRow]:
    """Return two rows, which end to end are one batch; one of them has no tree."""
    rows = packed(store, 512)
    return [rows.row(number) for number in range(rows.num_rows)]


def same_gradients(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted):
        # The norms of transformers' layers round to fp32.
        assert float((mine - theirs).norm()) <= 1e-6 * float(theirs.norm())


def test_loss_and_gradients_are_those_of_separate_rows(store, separately):
    """A branch at a wrong position, or one that sees too much or too little, is learnt without a word."""
    model, loss, gradients = separately
    trees = rows_of(store)
    found = [loss_of(model, collate(trees)), *(loss_of(model, collate([row])) for row in trees)]
    assert found[0][0] == pytest.approx(loss, rel=1e-9)
    assert found[0][0] == pytest.approx(sum(loss for loss, _ in found[1:]), rel=1e-9)
    same_gradients(found[0][1], gradients)


def paths_of(row: PackedRow) -> list[PackedRow]:
    """Return each part of a row behind what it follows, as a row of its own that learns the part alone."""
    assert row.branches is not None and row.positions is not None
    columns: list[list[np.ndarray]] = []
    for (parent, place), start, end in zip(row.branches, row.cu_seqlens, row.cu_seqlens[1:]):
        own = [row.input_ids[start:end], row.weights[start:end], row.positions[start:end]]
        if parent >= 0:
            ids, weights, positions = (column[:place] for column in columns[parent])
            own = [np.concatenate(pair) for pair in zip((ids, weights * 0, positions), own)]
        columns.append(own)
    return [row_of(ids, weights)._replace(positions=positions) for ids, weights, positions in columns]


@pytest.mark.parametrize("chunks", [2, 4])
def test_skipped_positions_are_those_of_separate_rows(store, chunks):
    """A branch that counts on from its row, and not from the skips before it, stands where its text is not."""
    model, pose = small_model(400, "llama"), PoseConfig(target_length=2048, chunks=chunks)
    for number, row in enumerate(rows_of(store)):
        row = skip_positions(row, pose, seed=3, stage="far", number=number)
        paths = paths_of(row)
        for path in paths:
            steps = np.diff(path.positions)
            assert path.positions[0] == 0 and steps.min() >= 1 and path.positions[-1] < 2048
            assert (steps > 1).sum() < chunks
        assert any(path.positions[-1] > 600 for path in paths)
        found, wanted = loss_of(model, collate([row])), [loss_of(model, collate([path])) for path in paths]
        assert found[0] == pytest.approx(sum(loss for loss, _ in wanted), rel=1e-9)
        same_gradients(found[1], [sum(parts) for parts in zip(*(gradients for _, gradients in wanted))])


def test_in_chunks_they_are_those_of_separate_rows(store, separately):
    """A branch follows tokens of chunks far before its own, not those of the chunk before it."""
    model, loss, gradients = separately
    trees = rows_of(store)
    model.zero_grad()
    found = recurrent_step(model, collate(trees), chunk_tokens=200, weight=total_weight(trees))
    assert float(found.loss) == pytest.approx(loss, rel=1e-9)
    same_gradients([p.grad * total_weight(trees) for p in model.parameters()], gradients)


SPREADS = {
    "ring": {"cp_ring": 2},
    "ring contiguous": {"cp_ring": 2, "layout": "contiguous"},
    "ring balanced": {"cp_ring": 2, "layout": "balanced"},
    "striped": {"cp_ring": 2, "schedule": "striped"},
    "dist_flash": {"cp_ring": 2, "schedule": "dist_flash"},
    "ulysses": {"cp_ulysses": 2},
    "all_gather": {"cp_ring": 2, "schedule": "all_gather"},
}


def spread_over_ranks(
    rank: int, path: str, vocab_size: int, model_type: str
) -> dict[str, tuple[float, list[torch.Tensor]]]:
    """Return loss and gradients of all rows by each way to spread them."""
    found, model = {}, small_model(vocab_size, model_type)
    for name, degrees in SPREADS.items():
        batch = build_spread(ParallelConfig(**degrees), torch.device("cpu")).batch(rows_of(TokenStore(path)))
        loss, gradients = loss_of(model, batch)
        total = torch.tensor(loss, dtype=torch.float64)
        for part in (total, *gradients):
            dist.all_reduce(part)
        found[name] = float(total), gradients
    return found


@pytest.mark.parametrize("separately", ["mistral"], indirect=True)
def test_over_processes_they_are_those_of_separate_rows(store, separately):
    """A rank that takes the row's offsets for positions, or its neighbour for what a branch follows, learns another."""
    model, loss, gradients = separately
    fields = model.config.vocab_size, model.config.model_type
    ranks = spawn_local(spread_over_ranks, 2, str(store.path), *fields, timeout_seconds=PATIENCE_SECONDS)
    assert ranks[0].keys() == SPREADS.keys()
    for mine, their_gradients in ranks[0].values():
        assert mine == pytest.approx(loss, rel=1e-9)
        same_gradients(their_gradients, gradients)


words = st.lists(st.integers(0, 3), min_size=1, max_size=8)


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[list[int]], TokenTree]:
    """Draw samples that begin alike, and their tree."""
    samples = [draw(words)]
    for size, rest in draw(st.lists(st.tuples(st.integers(1, 20), words), max_size=5)):
        samples.append([*samples[-1][:size], *rest])
    samples.reverse()
    masks = [np.ones(len(sample), np.uint8) for sample in samples]
    return samples, token_tree([(np.array(sample, np.uint32), mask) for sample, mask in zip(samples, masks)])


def table_of(tree: TokenTree) -> TreeDocuments:
    starts, parents = tree.parts[:, 0].astype(int), tree.parts[:, 1].astype(int)
    parents[parents == np.arange(len(parents))] = -1
    return TreeDocuments(np.append(starts, len(tree.ids)), np.stack([parents, tree.parts[:, 2]], axis=1))


def seen_in(bands: Bands, num_queries: int, num_keys: int) -> np.ndarray:
    """Return how many bands show each query each key, [queries, keys]."""
    sees = np.zeros((num_queries, num_keys), int)
    columns = (bands.q_start, bands.q_len, bands.k_start, bands.k_len, bands.lo, bands.hi)
    for q, q_len, k, k_len, lo, hi in zip(*(column.tolist() for column in columns)):
        distance = np.arange(q_len)[:, None] - np.arange(k_len)
        sees[q : q + q_len, k : k + k_len] += (lo <= distance) & (distance <= hi)
    return sees


reaches = {"window": st.none() | st.integers(1, 6), "chunk": st.none() | st.integers(1, 6)}


@given(drawn=trees(), **reaches)
@settings(max_examples=100, deadline=None)
def test_random_trees_see_what_their_samples_see(drawn, window, chunk):
    """Every token sees its own sample's tokens before it, within window and chunk, each once; labels are all there."""
    samples, tree = drawn
    documents = table_of(tree)
    positions = documents.positions().numpy()
    sees = seen_in(documents.bands(window, chunk), len(tree.ids), len(tree.ids))
    assert sees.max() == 1
    full = Counter()
    for token, row in enumerate(sees):
        position = int(positions[token])
        oldest = max(0, position - (window or position + 1) + 1, position // chunk * chunk if chunk else 0)
        seen = np.flatnonzero(row)
        assert sorted(positions[seen]) == list(range(oldest, position + 1))
        if token not in tree.parts[:, 0]:
            order = seen[np.argsort(positions[seen])]
            full[tuple(tree.ids[order].tolist())] += int(tree.mask[token])
    if window is None and chunk is None:
        expected = Counter(tuple(sample[: end + 1]) for sample in samples for end in range(1, len(sample)))
        assert full == expected


@given(drawn=trees(), size=st.integers(1, 12), **reaches)
@settings(max_examples=50, deadline=None)
def test_chunks_of_random_trees_see_what_the_row_sees(drawn, size, window, chunk):
    """A key that a chunk does not keep, or keeps under another number, is one that a branch behind it does not see."""
    documents = table_of(drawn[1])
    num_tokens = documents.num_tokens
    expected = seen_in(documents.bands(window, chunk), num_tokens, num_tokens)
    row, sees = ChunkedRow(documents, size), np.zeros((num_tokens, num_tokens), int)
    for index in range(len(row)):
        span = row.span(index)
        own, earlier = row.bands(index, window, chunk)
        sees[span, span] += seen_in(own, span.stop - span.start, span.stop - span.start)
        for before, bands in earlier:
            kept = row.kept(before, window, chunk)
            sees[span, kept] += seen_in(bands, span.stop - span.start, kept.stop - kept.start)
            assert row.is_read_later(before)
    assert (sees == expected).all()


@given(drawn=trees(), layout=st.sampled_from(LAYOUTS), world=st.sampled_from([2, 3, 4]), **reaches)
@settings(max_examples=50, deadline=None)
def test_ranks_of_random_trees_see_what_the_row_sees(drawn, layout, world, window, chunk):
    """Between any two ranks, and all of them: a step of a ring that is left out, or a stride that is not undone."""
    documents = table_of(drawn[1])
    shards = documents.shards(layout, world, window=window)
    whole = TreeDocuments(shards.tree.cu_seqlens, shards.tree.branches)
    expected = seen_in(whole.bands(window, chunk), shards.num_padded, shards.num_padded)
    ranks = [(rank,) for rank in range(world)]
    everyone = tuple(range(world))
    places = {rank: shards.indices(rank[0]) for rank in ranks}
    together, order = np.concatenate([places[rank] for rank in ranks]), shards.order(everyone)
    places[everyone] = together if order is None else together[order]
    for rank in range(world):
        assert (shards.positions(rank) == whole.positions().numpy()[places[rank,]]).all()
    cut, steps = shards.cut(chunk), np.arange(world)
    meets = np.zeros((world, world), bool)
    for q, k in [*itertools.product(ranks, ranks), (everyone, everyone)]:
        sees = seen_in(cut.bands(q, k, window=window), len(places[q]), len(places[k]))
        assert (sees == expected[np.ix_(places[q], places[k])]).all()
        if len(q) == len(k) == 1:
            meets[q[0], k[0]] = sees.any()
    reach = [int(max(steps * meets[(place + steps) % world, place])) for place in steps]
    assert cut.reach(ranks, window=window) == reach


def test_balanced_gives_branches_their_work():
    """A branch of ten tokens behind a thousand costs a thousand times ten, wherever its tokens stand."""
    parts = np.array([1000, *[10] * 40])
    parents = np.array([[-1, 0], *[[0, 980]] * 40])
    documents = TreeDocuments(np.cumsum([0, *parts]), parents)
    work = documents.shards("balanced", 4).work().sum(axis=1)
    assert work.max() - work.min() <= 0.01 * work.mean()


def test_peek_shows_branches(store):
    """A tree that is shown as one text reads as an answer behind another."""
    result = CliRunner().invoke(app, ["data", "peek", str(store.path), "--json"])
    found = json.loads(result.stdout)
    assert [each["branches off"] for each in found["branches"]] == [0, 0, 0]
    assert found["learnt_tokens"] == int(store.mask(0).sum())
    result = CliRunner().invoke(app, ["data", "peek", str(store.path)])
    assert result.exit_code == 0 and "where it branches" in result.stdout


def test_peek_shows_branches_of_a_row(store, tmp_path):
    """The parts of a tree in a row looked like documents of their own."""
    spec = PackConfig(length=512, strategy="best_fit", remainder="pad", pad_id=0)
    plan = plan_packing(spec, store.lengths, np.arange(len(store)), 0)
    plan.save(tmp_path / "rows", stores=[store.path])
    result = CliRunner().invoke(app, ["data", "peek", str(tmp_path / "rows"), "--json"])
    spans = json.loads(result.stdout)["spans"]
    assert [span["branches off"] for span in spans].count(None) < len(spans)
    assert all(span["position"] == 0 for span in spans if span["branches off"] is None)


def test_traces_that_branch_are_audited(store, tmp_path):
    """Loops and duplicates are looked for in traces first: the audit ended at one that branches."""
    config = AuditConfig()
    found = audit([store], tmp_path / "audit", config, tokenizer=None, executor=LocalExecutor(1)).columns
    assert len(found["near_duplicate"]) == len(store)


def test_what_cannot_be_right_is_refused(chatty, store, tmp_path):
    """A reader that takes a tree for a text would learn answers behind the thoughts of others."""
    with pytest.raises(DataError, match="branches"):
        store.tokens(0)
    assert len(store.tokens(1))
    for more in ({"strategy": "concat", "length": 100}, {"specials": "bos", "bos_id": 1, "length": 512}):
        with pytest.raises(DataError, match="cut"):
            packed(store, **more)
    merged = merge_stores([store.path, store.path], tmp_path / "merged")
    assert merged.branching.tolist() == [0, 2, 3, 5] and not verify(merged.path).problems
    assert np.array_equal(merged.parts(5), store.parts(2))
    with pytest.raises(ArgumentError, match="tree"):
        TreeDocuments(np.array([0, 3, 5]), np.array([[-1, 0], [0, 4]]))
    documents = collate([packed(store, 512).row(0)]).documents
    assert isinstance(documents, TreeDocuments)
    for table in (documents, documents.shards("zigzag", 2)):
        with pytest.raises(ArgumentError, match="layers with a state"):
            table.state_borders()
    # The template opens a thought when it is asked, and writes none where there is none.
    opening = FORGETFUL.replace("|>assistant\n{% endif %}", "|>assistant\n<think>\n{% endif %}")
    chat = ChatFormat(chatty, opening, config=ChatConfig(true_prefixes=True))
    with pytest.raises(MessagesError, match="as when the model is asked"):
        chat.encode_record([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": {"document_mask": False}}, "document_mask"),
        (
            {"model": {"model_type": "lfm2", "num_key_value_heads": 2, "layer_types": ["conv"]}},
            "layers with a state",
        ),
        ({"stage": {"loss_average": "samples"}}, "loss_average"),
    ],
)
def test_runs_that_cannot_read_trees_end_before_they_begin(chatty, store, changes, words):
    """What is found out in the first step is found out behind hours of a queue."""
    stage = {
        "name": "chat", "lr": 1e-3, "objective": "sft", "context_length": 512, "tokens": 512, "batch_tokens": 512,
        "max_epochs": 9, "streams": {"a": {"store": str(store.path)}}, **changes.pop("stage", {}),
    }  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = {"model_type": "llama", "vocab_size": chatty.vocab_size, **sizes, **changes.pop("model", {})}
    config = TrainConfig.from_dict({"model": {"hf_config": fields}, "stages": [stage], **changes})
    with pytest.raises(ConfigError, match=words):
        plan_run(config, data_root=store.path.parent)
