"""Which FlashAttention computes, and what is said when it is not the one that was meant."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from longspan.core.errors import ArgumentError
from longspan.kernels.attention import flash_versions
from longspan.kernels.attention.flash_versions import FlashVersion, use_flash


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flash_versions, "_chosen", {})
    yield
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)


@pytest.mark.parametrize(
    ("major", "installed", "wanted", "active", "said"),
    [
        (9, True, "auto", ["FA3"], "fa3: made for this GPU"),
        (10, True, "auto", ["FA4"], "fa4: made for this GPU"),
        (9, False, "auto", [], r"fa2: torch's own, because fa3.* \(No module named 'flash_attn_interface'\)"),
        (8, True, "auto", [], "fa2: torch's own; no newer one is made for capability 8"),
        (9, True, "fa2", [], "fa2: torch's own$"),
        (9, True, "fa4", ["FA4"], "fa4: asked for"),
    ],
)
def test_the_newest_that_works_computes(
    major: int,
    installed: bool,
    wanted: FlashVersion,
    active: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A newer kernel that is there and not used is a third of the speed; one that is not there must not end a run."""
    activated: list[str] = []

    def activate(name: str) -> None:
        if not installed:
            raise ModuleNotFoundError("No module named 'flash_attn_interface'")
        activated.append(name)

    monkeypatch.setattr(flash_versions, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    with caplog.at_level("INFO"):
        why = use_flash(wanted)
    assert activated == active and re.search(said, why)
    assert any(why in line for line in caplog.messages)
    # What a recipe chose stays when the kernel is chosen.
    assert use_flash() == why and activated == active


def test_one_that_is_asked_for_and_missing_ends_the_run() -> None:
    """torch's own registration says why."""
    with pytest.raises(ArgumentError, match=r"fa3 cannot be used here\n  found: .*flash_attn"):
        use_flash("fa3")
