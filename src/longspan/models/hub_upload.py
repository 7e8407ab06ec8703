"""An exported folder as a repository of the Hugging Face hub, private unless said otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from longspan.core.errors import ArgumentError, LongspanError, RunError

__all__ = ["check_push", "push_folder"]

KEPT = {".gitattributes"}
"""What the hub itself puts into a new repository."""
NOT_UPLOADED = ["settings.yaml"]
"""It names folders of this machine."""


def check_push(repo: str, *, overwrite: bool) -> None:
    """See that a folder can be pushed, before it is made.

    Raises:
        ArgumentError: no repository's name, nobody is logged in, or files are there and `overwrite` is not given.
        RunError: the hub does not answer, or refuses.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ArgumentError("this is no name of a repository", found=repr(repo), allowed=str(error)) from None
    if repo.count("/") != 1:
        raise ArgumentError("a repository is named with its owner", found=repr(repo), allowed="OWNER/NAME")
    with _hub(repo) as api:
        there = set(api.list_repo_files(repo)) - KEPT if api.repo_exists(repo) else set()
    if there and not overwrite:
        raise ArgumentError(
            f"{repo} holds {len(there)} files already",
            found=", ".join(sorted(there)[:5]),
            fix="name another repository, or replace them all with --overwrite",
        )


def push_folder(folder: str | Path, repo: str, *, public: bool = False, overwrite: bool = False) -> str:
    """Upload a folder to a repository, which is made if it is not there; return the address of the commit.

    A repository that is there stays as private or public as it is. With `overwrite` its files are replaced: those that
    the folder does not have are deleted; its history keeps them. The token is that of `hf auth login` or HF_TOKEN.

    Raises:
        ArgumentError: see `check_push`.
        RunError: the hub does not answer, or refuses; the folder here is whole.
    """
    check_push(repo, overwrite=overwrite)
    with _hub(repo, f"{folder} is whole: try again with `hf upload {repo} {folder}`") as api:
        api.create_repo(repo, private=not public, exist_ok=True)
        pushed = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload a model exported by longspan",
            ignore_patterns=list(NOT_UPLOADED),
            delete_patterns="*" if overwrite else None,
        )
    return str(pushed.commit_url)


@contextlib.contextmanager
def _hub(repo: str, fix: str = "try again later, or leave out --push") -> Iterator[HfApi]:
    """Yield the hub's client; what goes wrong with it is one message, without the token."""
    token = get_token()
    if token is None:
        raise ArgumentError(
            "nobody is logged in to the hub", fix="hf auth login, or the token in the variable HF_TOKEN"
        )
    try:
        yield HfApi(token=token, library_name="longspan")
    except LongspanError:
        raise
    except Exception as error:  # noqa: BLE001  of whichever package talks to the hub in this version
        # Its own errors say which file, those behind them why.
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        said = " ".join(" ".join(map(str, causes)).split()).replace(token, "***")
        raise RunError(f"the hub did not take {repo}", found=said, fix=fix) from None
