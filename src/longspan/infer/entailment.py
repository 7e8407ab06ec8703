"""A text-to-text model that says whether one text follows from another, as AutoAIS asks it (Honovich et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from longspan.core.errors import ConfigError
from longspan.models.hf import usable_device

_ANSWER_TOKENS = 10


class EntailmentModel:
    """A model of `google/t5_xxl_true_nli_mixture`'s kind: it answers 1 where the premise supports the hypothesis.

    Args:
        model: a local folder or a name on the hub.

    Raises:
        ConfigError: it cannot be read, or is no text-to-text model.
    """

    def __init__(self, model: str) -> None:
        try:
            loaded = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.bfloat16)
            self._tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(
                f"{model} is not read as a model that judges",
                found=next(iter(str(error).strip().splitlines()), type(error).__name__),
                allowed="a text-to-text model such as google/t5_xxl_true_nli_mixture: a folder, or a name on the hub",
            ) from None
        self._device = usable_device()
        self._model = loaded.to(self._device).eval()

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return for each premise and hypothesis whether one supports the other. Cost: a run of the model each."""
        return [self._one(premise, hypothesis) for premise, hypothesis in pairs]

    @torch.inference_mode()
    def _one(self, premise: str, hypothesis: str) -> bool:
        text = f"premise: {premise} hypothesis: {hypothesis}"
        ids = self._tokenizer(text, return_tensors="pt").input_ids.to(self._device)
        # One by one, as published: rows that are filled up round otherwise in bfloat16.
        answer = self._model.generate(ids, max_new_tokens=_ANSWER_TOKENS, do_sample=False, num_beams=1)
        return bool(self._tokenizer.decode(answer[0], skip_special_tokens=True) == "1")
