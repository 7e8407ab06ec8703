"""What a needle grid costs before it is run: prompts, tokens, and what reading a shared prefix once saves."""

from __future__ import annotations

from typing import NamedTuple

from longspan.core.errors import ConfigError
from longspan.eval.needle_config import NeedleConfig
from longspan.eval.prompts import PromptForm
from longspan.infer.flops import GridPrompt, ladder, work_by_themselves, work_shared


class GridCost(NamedTuple):
    """The size of a grid."""

    cells: int
    prompts: int
    prompt_tokens: int
    tokens_read: int
    """Tokens that are read when what prompts have in common is read once."""
    factor_linear: float
    """How many times fewer these are than `prompt_tokens`."""
    factor_attention: float
    """How many times fewer pairs of query and key."""


def grid_cost(settings: NeedleConfig, form: PromptForm, *, multi_key: bool = False) -> GridCost:
    """Return what a grid costs, in closed form; nothing is composed.

    With 11 depths over even lengths about half is read: what stands before a needle is shared, what follows
    is not. Other facts (distractors) stand elsewhere at each length, so only depths share then.

    Raises:
        ConfigError: a length has no room for the planted text and the question.
    """
    groups = _groups(settings, form, multi_key=multi_key)
    alone = [work_by_themselves(group) for group in groups]
    shared = [work_shared(group) for group in groups]
    tokens, read = (settings.samples * sum(work.tokens for work in works) for works in (alone, shared))
    cells = len(settings.cells())
    return GridCost(
        cells=cells,
        prompts=cells * settings.samples,
        prompt_tokens=tokens,
        tokens_read=read,
        factor_linear=tokens / read,
        factor_attention=sum(work.pairs for work in alone) / sum(work.pairs for work in shared),
    )


def _groups(settings: NeedleConfig, form: PromptForm, *, multi_key: bool) -> list[list[GridPrompt]]:
    """Return the prompts of one haystack, those that share a trunk together."""
    number = "9" * settings.answer_digits
    if settings.mode == "teacher_forced":
        asked = form.count(settings.question, answer=settings.answer.replace("{number}", number))
    else:
        prefix = settings.answer_prefix and f" {settings.answer_prefix}"
        asked = form.count(settings.question, answer_prefix=prefix) + form.within(settings.max_new_tokens)
    planted = len(form.tokenizer.encode(settings.needle.replace("{number}", number)))
    if min(settings.lengths) <= asked + planted:
        raise ConfigError(
            "a context length has no room for the planted facts and the question",
            found=f"{min(settings.lengths)} tokens",
            allowed=f"more than {asked + planted}",
            fix="leave out the shortest lengths",
        )
    if multi_key:
        # Questions begin alike, up to their key.
        asked -= len(form.tokenizer.encode(settings.question.partition("{key}")[0]))
        return [[GridPrompt(length - asked, length)] * len(settings.depths) for length in settings.lengths]
    rest = asked + planted
    if settings.num_distractors or settings.num_needles > 1:
        return [ladder([length], settings.depths, rest=rest) for length in settings.lengths]
    return [ladder(settings.lengths, settings.depths, rest=rest)]
