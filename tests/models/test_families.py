"""No causal family of transformers is wrong: each is right, or refused with a reason, and docs/models.md says which."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longspan.models.families import RIGHT
from longspan.models.hf import hidden_states, load_model, save_model
from longspan.parallel.launch import spawn_local
from tests.models.family_columns import (
    ALONE,
    COLUMNS,
    all_columns,
    columns_alone,
    row_of,
    small_model,
)
from tests.models.family_page import PAGE, page, rows_of, wrong_ones
from tests.models.family_survey import quiet, survey, survey_all
from tests.patience import PATIENCE_SECONDS


@pytest.mark.slow
def test_every_family_is_right_or_refused() -> None:
    """A family that trains another model than transformers' without a word, or a page that says otherwise."""
    findings = survey_all()
    right = {family for family, finding in findings.items() if finding.verdict == "right"}
    assert right == RIGHT
    columns = all_columns(sorted(right))
    assert not wrong_ones(findings, columns)
    assert page(findings, columns) == PAGE.read_text(encoding="utf-8"), "python -m tests.models.family_page"


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen2_moe"])
def test_the_page_says_what_works_with_a_family(family: str) -> None:
    """A column that broke since the page was written, for as many families as each change can wait for."""
    cells = dict(zip(COLUMNS, rows_of(PAGE.read_text(encoding="utf-8"))[family], strict=True))
    found = columns_alone(family)
    assert {name: found[name].reason or "yes" for name in ALONE} == {name: cells[name] for name in ALONE}


SHARED = ("gpt_oss", "deepseek_v3", "minicpm3", "llama4_text", "mixtral", "gemma3_text", "qwen3_next")


def shared_hidden(rank: int, folders: dict[str, str]) -> dict[str, np.ndarray]:
    with quiet(), torch.no_grad():
        return {
            family: hidden_states(load_model(folder, tp=2), row_of(1).input_ids).numpy()
            for family, folder in folders.items()
        }


@pytest.mark.slow
def test_matrices_shared_by_two_processes_are_the_same_model(tmp_path: Path) -> None:
    """Sinks of all heads beside half of them, latent keys that are split as if they had heads."""
    folders = {family: str(tmp_path / family) for family in SHARED}
    expected = {}
    with quiet(), torch.no_grad():
        for family, folder in folders.items():
            model = small_model(family)
            save_model(model, folder)
            expected[family] = hidden_states(model, row_of(1).input_ids).numpy()
    found = spawn_local(shared_hidden, 2, folders, timeout_seconds=4 * PATIENCE_SECONDS)[0]
    for family, whole in expected.items():
        assert np.abs(found[family] - whole).max() <= 1e-5 * np.abs(whole).max(), family


def test_the_page_lists_the_families_that_are_not_tried_when_opened() -> None:
    """A family that is taken for right without a test that found it so."""
    assert rows_of(PAGE.read_text(encoding="utf-8")).keys() == RIGHT


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("nemotron", ""),
        ("deepseek_v32", "indexer"),
        ("recurrent_gemma", "carry a state"),
        ("doge", "mask of its own"),
        ("mamba", "registry"),
    ],
)
def test_refusals_name_what_the_family_has(family: str, reason: str) -> None:
    """Sparse attention was said to carry a state, and a family that drops the document table to lack one."""
    finding = survey(family)
    assert finding.verdict == ("refused" if reason else "right") and reason in finding.reason, finding


def test_a_layer_that_attends_twice_is_refused_where_its_keys_are_kept() -> None:
    """Differential attention calls twice in a layer: the second keys took the first ones' place, without a word."""
    found = columns_alone("diffllama", ("apart", "chunks", "prefix"))
    assert found["apart"].verdict == "yes"
    for name in ("chunks", "prefix"):
        assert found[name].verdict == "refused" and "more than once" in found[name].reason, found
