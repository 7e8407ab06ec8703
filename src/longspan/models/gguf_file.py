"""GGUF files for llama.cpp: written by llama.cpp's own converter, then read back and held against the model's RoPE.

The converter, `convert_hf_to_gguf.py`, is part of llama.cpp and in no package of the index; it is called where it lies.
It writes no word of a RoPE that it does not know, and llama.cpp computes some things its own way, so what a GGUF file
cannot say is refused before a weight is loaded:

    default, linear     the base, and a factor
    llama3              the base, and by how much each pair is slowed, as a tensor
    yarn                factor, original length and betas; the attention factor is llama.cpp's own, 0.1 ln(factor) + 1,
                        whatever the file says
    longrope            both lists of factors as tensors, for the families whose converters write them (Phi-3, MiniCPM)

Nor does llama.cpp give every family its sliding windows: those of Mistral and others are left out there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longspan.core.errors import ArgumentError, ConfigError, DataError, MissingDependencyError, RunError
from longspan.core.files import disk_errors
from longspan.core.log import get_logger, log_once
from longspan.core.optional import require
from longspan.models.hf import own_config
from longspan.models.hf_config import longrope_scale, rope_by_layer_type, rope_of_full, text_config
from longspan.models.shape import model_shape

__all__ = [
    "check_gguf",
    "find_converter",
    "gguf_rope",
    "refuse_config",
    "write_gguf",
    "yarn_settings_refused",
]

CONVERTER = "convert_hf_to_gguf.py"
_HOW = f"git clone --depth 1 https://github.com/ggml-org/llama.cpp, then --converter llama.cpp/{CONVERTER}"
SAID = ("default", "linear", "llama3", "yarn", "longrope")
WINDOWLESS = (
    "ministral",
    "mistral",
    "mixtral",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "starcoder2",
)
"""Families that have a sliding window in transformers and none in llama.cpp, whatever the file says."""
FULL_EVERY = {"cohere2": 4, "gemma2": 2, "gemma3": 6, "gpt-oss": 2, "olmo2": 4}
"""Of llama.cpp's families whose files may not say which layers have a window: every so many-th has none."""
ONE_BASE = ("cohere2", "exaone4", "olmo2")
"""Of llama.cpp's families those that give the base of all layers to those with a window too, whatever the file says."""
LLAMA3_UNREAD = ("smollm3",)
"""Families whose converter writes Llama 3's RoPE into a file that llama.cpp then refuses."""
EXAONE4_LAYERS = 64
"""Of the one EXAONE 4 that llama.cpp gives its windows."""
LLAMA4_CHUNK = 8192
"""Tokens of a chunk of Llama 4 there."""
LONGROPE_FAMILIES = ("phi3", "phimoe", "minicpm", "minicpm3")
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Of YaRN, where a file does not say them."""
BASE = 10_000.0
"""Of llama.cpp's layers, with a window or without, where a file does not say it."""
_NAMES = {
    "rope.freq_base": "rope_theta",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
"""What a file calls the settings of a RoPE."""
_TOLERANCE = 1e-5
"""Files hold 32 bits."""
_SHOWN_LINES = 12


def find_converter(named: str | None) -> list[str]:
    """Return the words that start llama.cpp's converter: a file, the folder it lies in, or found on the PATH.

    Raises:
        ArgumentError: there is no such file.
        MissingDependencyError: it is not named and not on the PATH, or the package `gguf` is not installed.
    """
    require("gguf", extra="gguf", feature="a GGUF file")
    if named is not None:
        path = Path(named, CONVERTER) if Path(named).is_dir() else Path(named)
        if not path.is_file():
            raise ArgumentError(f"there is no converter {path}", fix=_HOW)
        return [sys.executable, str(path.resolve())]
    found = shutil.which(CONVERTER)
    if found is None:
        raise MissingDependencyError(f"a GGUF file is written by llama.cpp's {CONVERTER}", fix=_HOW)
    return [found]


def refuse_config(config: PretrainedConfig) -> None:
    """Refuse a model whose RoPE or windows a GGUF file cannot say, or that llama.cpp computes otherwise.

    Raises:
        ConfigError: it would be another model there, without a word.
    """
    text = text_config(config)
    if text.model_type in WINDOWLESS and (windows := _windows(text)):
        raise ConfigError(
            "llama.cpp gives this family no sliding window: beyond it the model would be another one there",
            found=f"{text.model_type} with a window of {max(windows):,} and {text.max_position_embeddings:,} positions",
            fix="where the model has been trained to see everything, say so in its config.json: sliding_window: null",
        )
    for rope in rope_by_layer_type(text.rope_parameters or {}).values():
        kind = rope.get("rope_type", "default")
        if kind not in SAID:
            raise ConfigError("a GGUF file cannot say this RoPE", found=kind, allowed=SAID)
        if kind == "longrope" and text.model_type not in LONGROPE_FAMILIES:
            raise ConfigError(
                "llama.cpp's converter leaves the factors of LongRoPE out for this family",
                found=text.model_type,
                allowed=LONGROPE_FAMILIES,
            )
        if kind == "llama3" and text.model_type in LLAMA3_UNREAD:
            raise ConfigError(
                "llama.cpp does not load a file of this family with Llama 3's RoPE", found=text.model_type
            )
        if kind == "longrope":
            get_logger("models.gguf").warning(
                "llama.cpp takes LongRoPE's long factors for every prompt where it is started with a context of more "
                "than %s tokens, and the short ones else; transformers goes by the length of each prompt",
                f"{rope['original_max_position_embeddings']:,}",
            )
        if kind == "yarn":
            _refuse_yarn(rope)


def yarn_settings_refused(rope: Mapping[str, Any]) -> list[str]:
    """Return the settings of a YaRN without regard to which llama.cpp computes it, each with its value."""
    odd = [name for name in ("mscale", "mscale_all_dim") if rope.get(name)]
    given = rope.get("attention_factor")
    odd += ["attention_factor"] if given is not None and not _alike(given, _own_factor(rope)) else []
    return [f"{name}: {rope[name]}" for name in odd]


def _own_factor(rope: Mapping[str, Any]) -> float:
    """Return the attention factor that llama.cpp gives every YaRN."""
    return 0.1 * float(np.log(rope["factor"])) + 1


def _refuse_yarn(rope: Mapping[str, Any]) -> None:
    if odd := yarn_settings_refused(rope):
        raise ConfigError(
            "llama.cpp computes YaRN without regard to this setting, so the model would be another one there",
            found=", ".join(odd),
            allowed=f"an attention_factor of 0.1 ln(factor) + 1 = {_own_factor(rope):.4f}, and none of the others",
        )
    if rope.get("truncate") is False:
        get_logger("models.gguf").warning(
            "llama.cpp rounds the borders between YaRN's fast and slow pairs, which this model does not "
            "(truncate: false): the pairs at them turn a little faster or slower there"
        )
    if rope.get("original_max_position_embeddings") is None:
        raise ConfigError(
            "the converter needs YaRN's original_max_position_embeddings, which the model's config does not say",
            fix="say it with --rope, all keys of the model's own and this one",
        )


def write_gguf(folder: str | Path, out: str | Path, kind: str, converter: list[str]) -> Path:
    """Convert a Hugging Face folder to the file `out`, whole or not at all; return it. `kind`: as the converter has it.

    Raises:
        DataError: the folder is no model.
        RunError: the converter failed, or what it wrote has another RoPE or length than the model.
    """
    out = Path(out)
    config = own_config(folder, as_saved=True)
    with disk_errors(out), tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as aside:
        made = Path(aside) / out.name
        command = [*converter, str(folder), "--outfile", str(made), "--outtype", kind]
        get_logger("models.gguf").info("running %s", " ".join(command))
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if done.returncode != 0 or not made.is_file():
            said = "\n".join(done.stdout.splitlines()[-_SHOWN_LINES:])
            raise RunError(
                f"llama.cpp's converter made no GGUF file of {folder}, which is whole",
                found=f"exit code {done.returncode}\n{said}",
            )
        check_gguf(made, config)
        os.replace(made, out)
    return out


def check_gguf(file: str | Path, config: PretrainedConfig) -> None:
    """Hold context length, RoPE and windows of a GGUF file against those of a model.

    Raises:
        RunError: they differ: asked there, it would be another model.
    """
    family, said, tensors = _read(file)
    text = text_config(config)
    wrong = [
        *_differences(text, said, tensors),
        *_window_differences(text, family, said),
        *_window_rope_differences(text, family, said),
    ]
    if wrong:
        raise RunError(
            "the GGUF file that llama.cpp's converter wrote is another model than this one",
            found="; ".join(wrong),
            fix="take a newer llama.cpp, or write another RoPE with --rope",
        )


def gguf_rope(file: str | Path) -> tuple[dict[str, Any], int | None]:
    """Return the RoPE that a GGUF file says, and its context length.

    The names are those of transformers; the `rope_type` of one that is a tensor is `tensor`.
    """
    _, said, tensors = _read(file)
    named = said.get("rope.scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "tensor" if tensors else {"none": "default"}.get(named, named)}
    rope |= {key: said[name] for name, key in _NAMES.items() if name in said}
    return rope, said.get("context_length")


def _read(file: str | Path) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Return llama.cpp's name of the family, what a file says of that, and its tensors of RoPE."""
    gguf = require("gguf", extra="gguf", feature="reading a GGUF file")
    reader = gguf.GGUFReader(file)
    family = str(reader.fields["general.architecture"].contents())
    said = {
        name.removeprefix(f"{family}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{family}.")
    }
    tensors = {each.name: np.array(each.data) for each in reader.tensors if each.name.startswith("rope_")}
    return family, said, tensors


def _windows(text: PretrainedConfig) -> set[int] | None:
    """Return the windows and chunks of a model's layers that are shorter than its length; None: they are not known."""
    try:
        shape = model_shape(text)
    except DataError as error:
        log_once("models.gguf", f"whether llama.cpp sees windows as this model does is not known: {error}")
        return None
    found = {width for kind in shape.kinds for width in (kind.window, kind.chunk) if width}
    return {width for width in found if width < text.max_position_embeddings}


def _differences(
    text: PretrainedConfig, said: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Iterator[str]:
    scaling = {
        name.removeprefix("rope.scaling."): value
        for name, value in said.items()
        if name.startswith("rope.scaling.")
    }
    rope = rope_of_full(text.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    yield from _check("the context length", said.get("context_length"), text.max_position_embeddings)
    yield from _check("the base", said.get("rope.freq_base", BASE), rope.get("rope_theta", BASE))
    named = kind if kind in ("linear", "yarn", "longrope") else "none"
    # LongRoPE is its factors: Phi-3's converter leaves out the name, by which llama.cpp computes nothing.
    unsaid = "longrope" if kind == "longrope" else "none"
    yield from _check("the type of RoPE", scaling.get("type", unsaid), named)
    if kind in ("linear", "yarn"):
        yield from _check("the factor", scaling.get("factor"), rope["factor"])
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        yield from _check("the original length", scaling.get("original_context_length"), original)
        for name, usual in BETAS.items():
            yield from _check(name, scaling.get(f"yarn_{name}", usual), rope.get(name) or usual)
    slowed = _slowed(text) if kind == "llama3" else None
    yield from _check("slowing of pairs", tensors.get("rope_freqs.weight"), slowed)
    for name in ("short", "long"):
        factors = np.asarray(rope[f"{name}_factor"]) if kind == "longrope" else None
        yield from _check(f"{name} factors", tensors.get(f"rope_factors_{name}.weight"), factors)
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        # That of MiniCPM leaves out the length: llama.cpp takes the context's.
        found = scaling.get("original_context_length", said.get("context_length"))
        yield from _check("the original length", found, original)
        scale = longrope_scale(rope, text.max_position_embeddings)
        yield from _check("the attention factor", scaling.get("attn_factor", 1.0), scale)


def _window_differences(text: PretrainedConfig, family: str, said: Mapping[str, Any]) -> Iterator[str]:
    windows, found = _windows(text), said.get("attention.sliding_window") or None
    if windows is None:
        return
    if family == "llama4":
        found = LLAMA4_CHUNK
    if family == "exaone4" and text.num_hidden_layers != EXAONE4_LAYERS:
        found = None
    if found is not None and found >= text.max_position_embeddings:
        found = None
    if windows != ({found} if found else set()):
        yield f"the window: {found or 'none'}, the model's {', '.join(map(str, sorted(windows))) or 'none'}"
    pattern = said.get("attention.sliding_window_pattern", FULL_EVERY.get(family))
    kinds = getattr(text, "layer_types", None)
    if not windows or pattern is None or kinds is None:
        return
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern != 0 for layer in range(len(kinds))]
    wanted = [kind != "full_attention" for kind in kinds]
    pairs = enumerate(zip_longest(map(bool, pattern), wanted))
    if wrong := [str(layer) for layer, (one, other) in pairs if one != other]:
        yield f"which layers have a window: not the model's in layers {', '.join(wrong)}"


def _window_rope_differences(text: PretrainedConfig, family: str, said: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is another RoPE in the layers with a window, where the model has one of their own there."""
    rope = rope_by_layer_type(text.rope_parameters or {}).get("sliding_attention")
    if rope is None:
        return
    # Older converters leave it out where it is llama.cpp's own.
    found = said.get("rope.freq_base" if family in ONE_BASE else "rope.freq_base_swa", BASE)
    yield from _check("the base of layers with a window", found, rope.get("rope_theta"))
    if (kind := rope.get("rope_type", "default")) != "default":
        yield f"the type of RoPE of layers with a window: none, the model's {kind}"


def _check(what: str, found: Any, wanted: Any) -> Iterator[str]:
    if not _alike(found, wanted):
        yield f"{what}: {_short(found)}, the model's {_short(wanted)}"


def _slowed(text: PretrainedConfig) -> np.ndarray:
    """Return by how much Llama 3's RoPE slows each pair of channels, as transformers computes it."""
    slow, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
    pairs = torch.arange(len(slow), dtype=torch.float64) / len(slow)
    return (rope_of_full(text.rope_parameters)["rope_theta"] ** -pairs / slow.double()).numpy()


def _short(value: Any) -> str:
    if not isinstance(value, np.ndarray):
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"{len(value)} numbers from {value.min():g} to {value.max():g}"


def _alike(found: Any, wanted: Any) -> bool:
    if found is None or wanted is None:
        return found is wanted
    if isinstance(wanted, str):
        return bool(found == wanted)
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    return found.shape == wanted.shape and bool(np.allclose(found, wanted, rtol=_TOLERANCE, atol=0))
