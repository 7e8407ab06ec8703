"""The hub, where it cannot be reached."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from longspan.core.hub import TRIES, look_for_hub


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch):
    """The state of the hub before anyone asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    look_for_hub.cache_clear()
    yield
    look_for_hub.cache_clear()


class Client:
    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)

    def head(self, url: str, timeout: float) -> None:
        assert url == constants.ENDPOINT and timeout < 10
        outcome = self.outcomes.pop(0)
        if outcome is not None:
            raise outcome


def test_a_hub_that_does_not_answer_is_asked_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt name without a network took a minute of retries for each of its files."""
    client = Client(*[OSError("no route")] * TRIES)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: client)
    for _ in range(3):
        look_for_hub()
    assert not client.outcomes and "no route" in caplog.text and len(caplog.records) == 1
    with pytest.raises((OfflineModeIsEnabled, OSError)):
        huggingface_hub.hf_hub_download("org/no-such-name", "config.json")


def test_one_lost_answer_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a shaky network must not look at its cache alone."""
    client = Client(OSError("lost"), None)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: client)
    look_for_hub()
    assert not constants.HF_HUB_OFFLINE and not client.outcomes
