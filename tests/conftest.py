"""What all rooms' tests share: nothing of the user's own cache folder is read or written, and no hub is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the package of the hub is imported


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let a test marked `both_kernels` run a second time through the kernel of CUDA."""
    if metafunc.definition.get_closest_marker("both_kernels"):
        metafunc.parametrize("_attention_kernel", ["cpu", "cuda"], indirect=True)


@pytest.fixture(autouse=True)
def _attention_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    if getattr(request, "param", "cpu") == "cpu":
        yield
        return
    from tests.flash_operators import ranks_with_flash

    with ranks_with_flash():
        yield
