"""llama.cpp's server out of a package: it is told what `llama-server` would make of the same flags."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest

from longspan.infer.llama_cpp import parser, settings_of

FLAGS = (
    "--model m.gguf --parallel 1 --ctx-size 32768 --cache-type-k q8_0 --cache-type-v q4_0 --flash-attn on "
    "--rope-scaling yarn --rope-scale 4.0 --rope-freq-base 5e5 --yarn-orig-ctx 8192 --yarn-beta-fast 16 "
    "--host 127.0.0.1 --port 81"
)


class Kind(enum.IntEnum):
    """llama.cpp's numbers, of its headers."""

    GGML_TYPE_Q4_0 = 2
    GGML_TYPE_Q8_0 = 8
    LLAMA_FLASH_ATTN_TYPE_ENABLED = 1
    LLAMA_ROPE_SCALING_TYPE_YARN = 2


def stand_in() -> Any:
    def made() -> Any:
        return SimpleNamespace(
            model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
        )

    return SimpleNamespace(
        CommonParams=made, ggml_type=Kind, llama_flash_attn_type=Kind, llama_rope_scaling_type=Kind
    )


@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "xllamacpp"])
def test_flags_become_settings(real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is dropped leaves another model or cache behind the label that names it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    reason = "the settings are those of pip install xllamacpp"
    package = pytest.importorskip("xllamacpp", reason=reason) if real else stand_in()
    told = settings_of(parser().parse_args(FLAGS.split()), package)
    assert (told.model.path, told.n_parallel, told.n_ctx, told.port) == ("m.gguf", 1, 32768, 81)
    assert (told.cache_type_k, told.cache_type_v, told.flash_attn_type) == (8, 2, 1)
    assert (told.rope_scaling_type, told.rope_freq_scale, told.rope_freq_base) == (2, 0.25, 5e5)
    assert (told.yarn_orig_ctx, told.yarn_beta_fast, told.hostnames) == (8192, 16.0, ["127.0.0.1"])
    assert told.cpuparams.n_threads == told.cpuparams_batch.n_threads == 3
