"""Where a stage's rows come from: stores, pack plans made before, rows packed by other tools."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.core.errors import ConfigError, DataError
from longspan.data.packed.materialize import materialize
from longspan.data.packed.packed_rows import PackedRows
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import plan_packing
from longspan.data.store import TokenStore
from longspan.data.store.measures import AuditedStore, Measures, digest_of
from longspan.models.hf import build_model
from longspan.train.batch import collate, total_weight
from longspan.train.config import StageConfig
from longspan.train.objectives import ModelWithLoss
from longspan.train.stream_config import StreamConfig
from longspan.train.streams import plan_stage, rows_ahead
from tests.patience import PATIENCE_SECONDS
from tests.train.conftest import recipe


def stage(**stream: Any) -> StageConfig:
    return StageConfig.from_dict(
        {
            "name": "s",
            "context_length": 16,
            "tokens": 16 * 8,
            "batch_tokens": 16 * 4,
            "lr": 0.1,
            "streams": {"text": stream},
        }
    )


def first_rows(plan: Any) -> list[list[int]]:
    return [row.input_ids.tolist() for row in plan.mixer.rows(0, 8)]


@pytest.fixture
def pack_plan(data_root: Path) -> Path:
    store = TokenStore(data_root / "plain")
    documents = np.arange(len(store.lengths), dtype=np.uint32)
    path = data_root / "plans" / "rows"
    plan_packing(PackConfig(length=16), store.lengths, documents, 5).save(path, stores=["plain"])
    return path


def test_a_plan_made_before_gives_its_rows(data_root: Path, pack_plan: Path) -> None:
    """A recipe that plans anew would ignore what `longspan data pack` printed and the user checked."""
    planned = plan_stage(stage(rows="plans/rows"), data_root=data_root, seed=0)
    from longspan.data.plans.packing import PackPlan
    from longspan.data.rows.loader import RowLoader

    loader = RowLoader([TokenStore(data_root / "plain")], PackPlan.load(pack_plan))
    assert first_rows(planned) == [loader.row(i).input_ids.tolist() for i in range(8)]
    assert planned.mixtures == {} and len(planned.tokenizers) == 1


def test_rows_written_for_other_tools_train_like_their_plan(
    data_root: Path, pack_plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed data that was released as MDS or JSON lines must give the same tokens and documents."""
    monkeypatch.chdir(data_root)
    expected = plan_stage(stage(rows="plans/rows"), data_root=data_root, seed=0)
    for form in ("mds", "jsonl"):
        materialize(pack_plan, data_root / f"rows-{form}", format=form)
        found = plan_stage(stage(rows=f"rows-{form}", shuffle=False), data_root=data_root, seed=0)
        assert first_rows(found) == first_rows(expected)
        borders = [row.cu_seqlens.tolist() for row in found.mixer.rows(0, 8)]
        assert borders == [row.cu_seqlens.tolist() for row in expected.mixer.rows(0, 8)]


def test_special_tokens_frame_documents_when_asked(data_root: Path) -> None:
    """A store holds no BOS: a model that expects one would be trained without it."""
    store = TokenStore(data_root / "plain")
    bos = store.manifest.tokenizer["bos_id"]
    for specials, first in (("none", None), ("bos", bos)):
        plan = plan_stage(
            stage(store="plain", pack={"specials": specials, "strategy": "intact"}),
            data_root=data_root,
            seed=0,
        )
        starts = [row.input_ids[0] for row in plan.mixer.rows(0, 8) if not row.continuation[0]]
        assert starts and all((start == bos) == (first == bos) for start in starts)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"rows": "plans/rows", "store": "plain"}, "either a store or rows"),
        ({}, "either a store or rows"),
        ({"rows": "plans/rows", "pack": {"strategy": "intact"}}, "no effect on a pack plan"),
        ({"rows": "plans/rows", "pack": {"specials": "bos"}}, "specials has no effect"),
        (
            {"rows": "plans/rows", "pack": {"overflow": "drop_tail", "strategy": "best_fit"}},
            "first tokens of each of `rows`",
        ),
        ({"rows": "plans/rows", "pack": {"overflow": "drop"}}, "`rows` have split or drop_tail"),
        ({"store": "plain", "pack": {"strategy": "split", "split_lengths": [8]}}, "plan for each length"),
        ({"store": "plain", "pack": {"min_length": 9, "max_length": 8}}, "no document is left"),
        ({"store": "plain", "loss_mask": True}, "has no masks"),
        ({"store": "plain", "begin_with_user": True}, "on records only"),
        ({"rows": "nowhere"}, "nowhere"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    data_root: Path, pack_plan: Path, stream: dict[str, Any], message: str
) -> None:
    """A strategy beside packed rows would be ignored in silence."""
    with pytest.raises((ConfigError, DataError), match=message):
        plan_stage(stage(**stream), data_root=data_root, seed=0)


def test_rows_of_another_length_are_refused(data_root: Path, pack_plan: Path) -> None:
    """Rows of 16 in a stage of 32 would train at a length that the recipe does not say."""
    wrong = stage(rows="plans/rows").model_copy(update={"context_length": 32})
    with pytest.raises(ConfigError, match="rows of another length"):
        plan_stage(wrong, data_root=data_root, seed=0)


def test_the_first_epoch_of_packed_rows_is_shuffled(
    data_root: Path, pack_plan: Path, monkeypatch: Any
) -> None:
    """Rows as stored are often in the order of their sources: training in that order is another curriculum."""
    monkeypatch.chdir(data_root)
    materialize(pack_plan, data_root / "rows-in-order", format="mds")
    stored = PackedRows(data_root / "rows-in-order")
    as_stored = [stored.row(number).input_ids.tolist() for number in range(8)]
    given = {"rows": "rows-in-order"}
    assert first_rows(plan_stage(stage(**given, shuffle=False), data_root=data_root, seed=0)) == as_stored
    first, again, other = (
        first_rows(plan_stage(stage(**given), data_root=data_root, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != as_stored and other not in (first, as_stored)
    whole = plan_stage(stage(**given), data_root=data_root, seed=0)
    assert {row for *_, row in map(whole.mixer.locate, range(stored.num_rows))} == set(range(stored.num_rows))
    fixed = plan_stage(stage(**given, shuffle=False), data_root=data_root, seed=0)
    assert fixed.mixer.fingerprint != whole.mixer.fingerprint  # a run does not go on in another order
    assert [fixed.mixer.locate(stored.num_rows + number).row for number in range(3)] == [0, 1, 2]


def test_longer_rows_train_a_shorter_stage(data_root: Path, pack_plan: Path, monkeypatch: Any) -> None:
    """Guards against refusing what was published at another length, and against losing tokens without a count."""
    monkeypatch.chdir(data_root)
    materialize(pack_plan, data_root / "rows-of-16", format="jsonl")
    half = stage(rows="rows-of-16", shuffle=False).model_copy(update={"context_length": 8})
    plan = plan_stage(half, data_root=data_root, seed=0)
    stored = PackedRows(data_root / "rows-of-16")
    assert plan.sources["text"].num_rows == 2 * stored.num_rows
    assert plan.mixer is not None
    assert (
        np.concatenate([row.input_ids for row in plan.mixer.rows(0, 2)]).tolist()
        == stored.row(0).input_ids.tolist()
    )
    assert plan.left_out["text"]["cut_documents"] > 0
    heads = stage(rows="rows-of-16", shuffle=False, pack={"overflow": "drop_tail"}).model_copy(
        update={"context_length": 12}
    )
    plan = plan_stage(heads, data_root=data_root, seed=0)
    assert plan.left_out["text"] == {"short_rows": 0, "tail_tokens": 4 * stored.num_rows}


def test_without_a_document_mask_a_row_is_one_text(data_root: Path) -> None:
    """Guards against a mask, a position or a label of the border that stays: the loss is that of transformers over the
    whole row, which knows of no documents."""
    seen = {"store": "plain", "document_mask": False}
    plan = plan_stage(stage(**seen), data_root=data_root, seed=0)
    assert plan.mixer is not None
    rows = plan.mixer.rows(0, 3)
    assert [row.cu_seqlens.tolist() for row in rows] == [[0, 16]] * 3
    model = build_model(recipe()["model"]["hf_config"], seed=1)
    batch = collate(rows)
    ours = ModelWithLoss(model)(batch)
    ids = torch.tensor(np.stack([row.input_ids for row in rows]))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        theirs = model(input_ids=ids, labels=ids).loss
    assert total_weight(rows) == 45
    assert ours.loss.item() / 45 == pytest.approx(theirs.item(), rel=1e-5)
    apart = plan_stage(stage(store="plain"), data_root=data_root, seed=0)
    assert apart.mixer is not None and apart.mixer.fingerprint != plan.mixer.fingerprint
    # Sources are counted by token all the same.
    assert torch.equal(batch.sources, collate(apart.mixer.rows(0, 3)).sources)


def test_a_stream_may_say_otherwise_than_its_stage(data_root: Path) -> None:
    """One switch for a stage, and for one of its streams."""
    mixed = {"a": {"store": "plain"}, "b": {"store": "plain", "document_mask": True}}
    values = stage(store="plain").to_dict() | {"document_mask": False, "streams": mixed}
    plan = plan_stage(StageConfig.from_dict(values), data_root=data_root, seed=0)
    held = {name: max(len(rows.row(n).documents) for n in range(9)) for name, rows in plan.sources.items()}
    assert held["a"] == 1 < held["b"]
    with pytest.raises(ConfigError, match="a teacher has read each document by itself"):
        StageConfig.from_dict(
            values | {"objective": "distill", "streams": {"a": {"store": "plain", "teacher": "x"}}}
        )


def test_older_keys_of_a_stream_are_still_read(caplog: pytest.LogCaptureFixture) -> None:
    """Recipes and settings of runs from before `pack` say the same keys beside the store, defaults included."""
    older = {
        "store": "plain", "strategy": "intact", "overflow": None, "specials": "bos", "min_document_tokens": 0,
        "max_document_tokens": 80, "group_by_length": True,
    }  # fmt: skip
    pack = {"strategy": "intact", "specials": "bos", "max_length": 80, "group_by_length": True}
    caplog.set_level("INFO")
    assert StreamConfig.from_dict(older) == StreamConfig.from_dict({"store": "plain", "pack": pack})
    assert (
        "write `pack: {strategy: intact, specials: bos, max_length: 80, group_by_length: True}`"
        in caplog.text
    )
    # An override of a recipe that has a `pack` already.
    assert (
        StreamConfig.from_dict({"store": "a", "pack": pack, "strategy": "concat"}).pack.strategy == "concat"
    )


def test_a_stream_packs_as_the_command_does(data_root: Path) -> None:
    """Overlap and sources apart could be had only by packing beforehand."""
    pack = {"overlap": 4, "by_source": True, "specials": "none"}
    rows = plan_stage(stage(store="plain", pack=pack), data_root=data_root, seed=0).mixer.rows(0, 40)
    assert all(len(set(row.sources.tolist())) == 1 for row in rows)
    heads = {tuple(row.weights[:5].tolist()) for row in rows if row.continuation[0]}
    # A piece that is no longer than the overlap is not repeated.
    assert (0, 0, 0, 0, 1) in heads and heads <= {(0, 0, 0, 0, 1), (1, 1, 1, 1, 1)}


def test_the_rows_of_the_next_step_are_read_meanwhile() -> None:
    """A step that waits for its rows leaves the device idle; a broken row must end its own step, not the one before."""
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()

    def read(step: int) -> list[Any]:
        asked.put(step)
        if step == 5:
            raise DataError("a torn row")
        return [step]

    ahead = rows_ahead(read, range(3, 7))
    assert next(ahead) == [3]
    assert [asked.get(timeout=PATIENCE_SECONDS) for _ in range(2)] == [3, 4]  # asked for by nobody yet
    assert next(ahead) == [4]
    with pytest.raises(DataError, match="torn"):
        next(ahead)
    assert list(rows_ahead(read, range(2))) == [[0], [1]] and list(rows_ahead(read, range(0))) == []


def test_a_stream_chooses_documents_by_an_audit_under_the_data_root(data_root: Path) -> None:
    """An audit looked for beside the recipe, or not asked at all, would train on what was to be left out."""
    store = TokenStore(data_root / "plain")
    kept = np.arange(len(store)) % 2 == 0
    columns = {
        "exact_duplicate": np.zeros(len(store), np.uint8),
        "near_duplicate": (~kept).astype(np.uint8),
        "repeated": np.zeros(len(store), np.float32),
        "compression": np.ones(len(store), np.float32),
    }
    digest = digest_of(store.lengths.key, store.lengths.tokens)
    Measures(columns, (AuditedStore("plain", len(store), digest),)).save(data_root / "audits" / "plain")
    chosen = {"mode": "none", "where": "near_duplicate == 0", "audit": "audits/plain"}
    planned = plan_stage(stage(store="plain", mixture=chosen), data_root=data_root, seed=0)
    (report,) = [plan.report for plan in planned.mixtures.values()]
    assert (report.documents, report.excluded) == (kept.sum(), (~kept).sum())
    (left_out,) = planned.left_out.values()
    assert left_out["unwanted"] == (~kept).sum(), "said before training"
