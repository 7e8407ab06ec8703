"""Two pretrained models from the package index, and prose that every CPython carries.

`make test-real` runs these tests. The models are kept in LONGSPAN_REAL_CACHE, or in the user's cache folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from longspan.core.errors import MissingDependencyError, RunError
from longspan.data.texts.python_corpus import reference_documents
from longspan.models.packaged import packaged_model
from tests.cli.conftest import Command, Outcome, fresh_logger, longspan

__all__ = ["Command", "Outcome", "fresh_logger", "longspan"]

# Before the tests' own XDG_CACHE_HOME hides it: half a gigabyte is not downloaded each time.
_OWN = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
CACHE = Path(os.environ.get("LONGSPAN_REAL_CACHE") or Path(_OWN) / "longspan" / "models")


def _model(name: str) -> Path:
    try:
        return packaged_model(name, CACHE)
    except (RunError, MissingDependencyError) as error:
        pytest.skip(f"{name} cannot be had: {' '.join(str(error).split())}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return _model("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return _model("gemma-3-270m")


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference prose, as JSON lines with a `text`; the longest documents first."""
    file = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    texts = sorted((document.text for document in reference_documents()), key=len, reverse=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file
