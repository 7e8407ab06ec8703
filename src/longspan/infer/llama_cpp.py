"""llama.cpp's server as the package xllamacpp carries it, with those flags of `llama-server` that an evaluation sets.

    python -m longspan.infer.llama_cpp --model model.gguf --ctx-size 32768 --host 127.0.0.1 --port 8080

It is started where there is no `llama-server`: releases of llama.cpp are no package, and this one installs with pip.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from typing import Any

from longspan.core.log import get_logger
from longspan.core.optional import require

SCALINGS = ("none", "linear", "yarn")


def main(words: Sequence[str] | None = None) -> None:
    """Serve until a signal ends this process."""
    options = parser().parse_args(words)
    xllamacpp = require("xllamacpp", extra="llamacpp", feature="llama.cpp's server")
    server = xllamacpp.Server(settings_of(options, xllamacpp))  # answers as long as it is referred to
    get_logger("infer").info("listening on %s", server.listening_address)
    signal.pause()


def settings_of(options: argparse.Namespace, xllamacpp: Any) -> Any:
    """Return the settings that llama.cpp makes of the same flags."""
    settings = xllamacpp.CommonParams()
    settings.model.path = options.model
    settings.hostnames, settings.port = [options.host], options.port
    settings.n_parallel, settings.n_ctx = options.parallel, options.ctx_size
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        # By itself it takes every core.
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(threads)
    for name in ("cache_type_k", "cache_type_v"):
        if (kind := getattr(options, name)) is not None:
            setattr(settings, name, xllamacpp.ggml_type[f"GGML_TYPE_{kind.upper()}"])
    flash = {"on": "ENABLED", "off": "DISABLED", "auto": "AUTO"}[options.flash_attn]
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type[f"LLAMA_FLASH_ATTN_TYPE_{flash}"]
    if options.rope_scaling is not None:
        scaling = f"LLAMA_ROPE_SCALING_TYPE_{options.rope_scaling.upper()}"
        settings.rope_scaling_type = xllamacpp.llama_rope_scaling_type[scaling]
    if options.rope_scale is not None:
        settings.rope_freq_scale = 1 / options.rope_scale
    for name in ("rope_freq_base", "yarn_orig_ctx", "yarn_beta_fast", "yarn_beta_slow"):
        if (value := getattr(options, name)) is not None:
            setattr(settings, name, value)
    return settings


def parser() -> argparse.ArgumentParser:
    """Return what reads the flags."""
    reader = argparse.ArgumentParser(prog="longspan.infer.llama_cpp", allow_abbrev=False)
    reader.add_argument("--model", required=True)
    reader.add_argument("--host", default="127.0.0.1")
    reader.add_argument("--port", type=int, required=True)
    reader.add_argument("--parallel", type=int, default=1)
    reader.add_argument("--ctx-size", type=int, default=0)
    reader.add_argument("--cache-type-k")
    reader.add_argument("--cache-type-v")
    reader.add_argument("--flash-attn", choices=("on", "off", "auto"), default="auto")
    reader.add_argument("--rope-scaling", choices=SCALINGS)
    reader.add_argument("--yarn-orig-ctx", type=int)
    for flag in ("--rope-scale", "--rope-freq-base", "--yarn-beta-fast", "--yarn-beta-slow"):
        reader.add_argument(flag, type=float)
    return reader


if __name__ == "__main__":
    main()
