"""Folders on the hub: private, not over other files, and the token is seen by the hub alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from longspan.core.errors import ArgumentError, RunError
from longspan.models.hub_upload import check_push, push_folder
from tests.hub_server import TOKEN, HubServer, hub_server

# The hub's client puts large files to httpx in a way that httpx has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as server:
        use_hub(server, monkeypatch)
        yield server


def use_hub(server: HubServer, patch: pytest.MonkeyPatch) -> None:
    """Let this process talk to a stand-in, logged in, by plain uploads."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for module in ("hf_api", "_commit_api"):
        patch.setattr(f"huggingface_hub.{module}.is_xet_available", lambda: False)
    patch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    for name in ("config.json", "README.md", "model.safetensors", "settings.yaml"):
        (place / name).write_text(f"this is {name}")
    return place


def test_a_new_repository_is_private(hub: HubServer, folder: Path) -> None:
    """A model that somebody only wanted to keep must not be the world's; nor the paths in settings.yaml."""
    url = push_folder(folder, "me/model")
    assert url == f"{hub.address}/me/model/commit/1"
    wanted = {name: f"this is {name}".encode() for name in ("config.json", "README.md", "model.safetensors")}
    assert hub.files["me/model"] == {**wanted, ".gitattributes": b""}
    assert hub.private == {"me/model": True}
    push_folder(folder, "me/open", public=True)
    assert not hub.private["me/open"]


def test_files_that_are_there_stay_unless_told(hub: HubServer, folder: Path) -> None:
    """Weights of another model beside ours would be loaded with them."""
    push_folder(folder, "me/model")
    hub.files["me/model"]["model-00001-of-00002.safetensors"] = b"old"
    asked = len(hub.asked)
    with pytest.raises(ArgumentError, match="me/model holds 4 files already") as caught:
        push_folder(folder, "me/model")
    assert "--overwrite" in str(caught.value) and "model-00001-of-00002" in str(caught.value)
    assert {method for method, _, _ in hub.asked[asked:]} == {"GET"}
    (folder / "config.json").write_text("newer")
    push_folder(folder, "me/model", overwrite=True)
    assert hub.files["me/model"].keys() == {".gitattributes", "config.json", "README.md", "model.safetensors"}
    assert hub.files["me/model"]["config.json"] == b"newer"


def test_the_token_is_seen_by_the_hub_alone(hub: HubServer, folder: Path, caplog, capfd) -> None:
    """A token in a log or a message is everybody's who reads the bug report."""
    caplog.set_level(logging.DEBUG)
    hub.broken = "/commit/"
    with pytest.raises(RunError, match="the hub did not take me/model") as caught:
        push_folder(folder, "me/model")
    assert "hf upload me/model" in str(caught.value) and "no rights to write" in str(caught.value)
    assert any(TOKEN in said for _, _, said in hub.asked)
    captured = capfd.readouterr()
    assert TOKEN not in f"{caught.value}{caplog.text}{captured.out}{captured.err}"
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_what_cannot_be_pushed_is_said_before_work(hub: HubServer, monkeypatch, tmp_path: Path) -> None:
    """A merged model of hours must not end with a wrong name or without a login."""
    for name in ("model", "a/b/c", "me/mo del", "me/model.git"):
        with pytest.raises(ArgumentError, match="repository"):
            check_push(name, overwrite=False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(ArgumentError, match="nobody is logged in"):
        check_push("me/model", overwrite=False)
    assert not hub.asked
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="the hub did not take"):
        check_push("me/model", overwrite=False)
