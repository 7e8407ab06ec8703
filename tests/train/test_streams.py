"""Where a stage's rows come from: stores, pack plans made before, rows packed by other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import ConfigError, DataError
from longspan.data.materialize import materialize
from longspan.data.packing import PackSpec, plan_packing
from longspan.data.store import TokenStore
from longspan.train.config import StageConfig
from longspan.train.streams import plan_stage


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


def ids(plan: Any) -> list[list[int]]:
    return [row.input_ids.tolist() for row in plan.mixer.rows(0, 8)]


@pytest.fixture
def pack_plan(data_root: Path) -> Path:
    store = TokenStore(data_root / "plain")
    documents = np.arange(len(store.lengths), dtype=np.uint32)
    path = data_root / "plans" / "rows"
    plan_packing(PackSpec(length=16), store.lengths, documents, 5).save(path, stores=["plain"])
    return path


def test_a_plan_made_before_gives_its_rows(data_root: Path, pack_plan: Path) -> None:
    """A recipe that plans anew would ignore what `longspan data pack` printed and the user checked."""
    planned = plan_stage(stage(rows="plans/rows"), data_root=data_root, seed=0)
    from longspan.data.loader import RowLoader
    from longspan.data.packing import PackPlan

    loader = RowLoader([TokenStore(data_root / "plain")], PackPlan.load(pack_plan))
    assert ids(planned) == [loader.row(i).input_ids.tolist() for i in range(8)]
    assert planned.mixtures == {} and len(planned.tokenizers) == 1


def test_rows_written_for_other_tools_train_like_their_plan(
    data_root: Path, pack_plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed data that was released as MDS or JSON lines must give the same tokens and documents."""
    monkeypatch.chdir(data_root)
    expected = plan_stage(stage(rows="plans/rows"), data_root=data_root, seed=0)
    for form in ("mds", "jsonl"):
        materialize(pack_plan, data_root / f"rows-{form}", format=form)
        found = plan_stage(stage(rows=f"rows-{form}"), data_root=data_root, seed=0)
        assert ids(found) == ids(expected)
        borders = [row.cu_seqlens.tolist() for row in found.mixer.rows(0, 8)]
        assert borders == [row.cu_seqlens.tolist() for row in expected.mixer.rows(0, 8)]


def test_special_tokens_frame_documents_when_asked(data_root: Path) -> None:
    """A store holds no BOS: a model that expects one would be trained without it."""
    store = TokenStore(data_root / "plain")
    bos = store.manifest.tokenizer["bos_id"]
    for specials, first in (("none", None), ("bos", bos)):
        plan = plan_stage(
            stage(store="plain", specials=specials, strategy="intact"), data_root=data_root, seed=0
        )
        starts = [row.input_ids[0] for row in plan.mixer.rows(0, 8) if not row.continuation[0]]
        assert starts and all((start == bos) == (first == bos) for start in starts)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"rows": "plans/rows", "store": "plain"}, "either a store or rows"),
        ({}, "either a store or rows"),
        ({"rows": "plans/rows", "strategy": "intact"}, "strategy has no effect"),
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
