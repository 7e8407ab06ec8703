"""The model at the start: where a pretrained one comes from, and the tokenizer of either kind."""

from __future__ import annotations

from pathlib import Path

from longspan.core.errors import DataError
from longspan.core.log import get_logger
from longspan.core.rundir import RunDir
from longspan.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from longspan.quickstart.config import BaseConfig, QuickstartConfig
from longspan.quickstart.texts import corpus_texts

BASE = "base"
"""Folder of the pretrained model, in the run."""


def make_base(run: RunDir, config: BaseConfig) -> None:
    """Write the pretrained model as the folder `base`, in float32, in which a CPU computes.

    Raises:
        DataError: it cannot be had; see also `models.packaged.packaged_model`.
    """
    import torch

    from longspan.models.hf import load_model, save_model
    from longspan.models.places import tokenizer_folder

    if (run.path / BASE).exists():
        return
    source = _source(config)
    run.event("base", model=config.model, source=str(source))
    save_model(load_model(source, dtype=torch.float32), run.path / BASE, tokenizer=tokenizer_folder(source))


def _source(config: BaseConfig) -> str | Path:
    """Return what is read: the folder or hub name, or the folder of the package where the hub does not give it."""
    from longspan.models.hf import own_config
    from longspan.models.packaged import packaged_model

    try:
        own_config(config.model)
    except DataError as error:
        if config.package is None:
            raise
        get_logger("quickstart").warning(
            "%s cannot be had from the hub; the package index has the same model in a few bits a weight (%s)",
            *(config.model, " ".join(str(error).split())),
        )
        return packaged_model(config.package)
    return config.model


def the_tokenizer(work: Path, config: QuickstartConfig) -> Tokenizer:
    """Return the tokenizer of the base, or the one that is trained on the corpus."""
    if config.tokenizer is None:
        return load_tokenizer(work / BASE)
    folder = work / "tokenizer"
    if not folder.exists():
        limit = config.tokenizer.chars_per_document
        texts = (record["text"][:limit] for record in corpus_texts(work, "train"))
        train_bpe(texts, folder, vocab_size=config.tokenizer.vocab_size)
    return load_tokenizer(folder)
