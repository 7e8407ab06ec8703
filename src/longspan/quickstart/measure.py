"""What is measured of each model: needles, RULER, perplexity."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from longspan.data.tokenizer import Tokenizer
from longspan.eval.needle_config import CHAT, NeedleConfig
from longspan.eval.ppl import PplConfig
from longspan.eval.task import Task
from longspan.quickstart.config import QuickstartConfig
from longspan.quickstart.texts import haystacks, held_out
from longspan.quickstart.variants import Variant, variants


class _Measured(NamedTuple):
    """A task, and of which models it is asked."""

    task: Task
    labels: tuple[str, ...] | None
    """None: of all."""
    longest: int


def evaluate(work: Path, config: QuickstartConfig, tokenizer: Tokenizer) -> None:
    """Write the records of every variant; those that are there already are not made again."""
    tasks = _tasks(work, config, tokenizer)
    for variant in variants(work, config):
        asked = {
            name: measured
            for name, measured in tasks.items()
            if measured.labels is None or variant.label in measured.labels
        }
        _evaluate_variant(work, config, variant, tokenizer, asked)


def _tasks(work: Path, config: QuickstartConfig, tokenizer: Tokenizer) -> dict[str, _Measured]:
    """Return the tasks by the name of their records."""
    from longspan.eval.needle import NeedleTask
    from longspan.eval.prompts import OWN_TEMPLATE, PromptForm
    from longspan.eval.ruler.cache import SampleCache
    from longspan.eval.ruler.task import Ruler

    settings = config.evaluation
    documents = haystacks(work, settings.split)
    form = PromptForm(tokenizer, chat_template=OWN_TEMPLATE if settings.chat else None)
    needle = NeedleConfig(
        lengths=settings.lengths,
        depths=settings.depths,
        samples=settings.samples,
        seed=_seed(config),
        key_split=settings.split,
        split=settings.split,
        repeat=settings.essays,
        # The whole answer is the model's, as with people: a begun one shows it where to copy from.
        **({**CHAT, "answer_prefix": ""} if settings.chat else {}),
    )
    grids: dict[str, tuple[NeedleConfig, tuple[str, ...] | None]] = {"needle": (needle, None)}
    if settings.beyond is not None:
        beyond = needle.model_copy(update={"lengths": (settings.beyond,)})
        grids["needle_beyond"] = (beyond, ("before", "after"))
    if settings.distractors:
        harder = needle.model_copy(update={"num_distractors": settings.distractors})
        grids["needle_distractors"] = (harder, ("after",))
    found = {
        name: _Measured(NeedleTask(grid, documents, form), labels, max(grid.lengths))
        for name, (grid, labels) in grids.items()
    }
    if settings.ruler is not None:
        essay = "\n".join(document.text for document in documents)
        asked = settings.ruler.model_copy(update={"seed": _seed(config)})
        ruler = Ruler(asked, form, essay=essay, cache=SampleCache(work / "ruler-samples"))
        found["ruler"] = _Measured(ruler, None, max(asked.lengths))
    return found


def _seed(config: QuickstartConfig) -> int:
    """Return the seed of what is asked."""
    return config.seed if config.evaluation.seed is None else config.evaluation.seed


def _evaluate_variant(
    work: Path, config: QuickstartConfig, variant: Variant, tokenizer: Tokenizer, tasks: dict[str, _Measured]
) -> None:
    from longspan.eval.ppl_run import BATCH_TOKENS, run_ppl
    from longspan.eval.runner import run_task
    from longspan.infer.local import LocalAnswerer
    from longspan.infer.perplexity import token_nll
    from longspan.models.hf import evaluated_dtype, load_model, usable_device
    from longspan.models.identity import model_identity

    settings, records = config.evaluation, work / "records"
    ppl = PplConfig(
        lengths=settings.ppl_lengths or settings.lengths,
        num_spans=settings.ppl_spans,
        seed=_seed(config),
        split=settings.split,
    )
    longest = max([*(measured.longest for measured in tasks.values()), *ppl.lengths])
    # In the type that the trained ones were computed in.
    dtype = evaluated_dtype(variant.path, usable_device(), config.extend.memory.compute_dtype)
    model = load_model(variant.path, rope=variant.rope, max_position_embeddings=longest, dtype=dtype)
    model = model.to(usable_device()).eval()
    identity = {
        **model_identity(model, variant.path, shown_as=str(variant.path.relative_to(work))),
        "trained_length": variant.trained_length,
    }
    named: dict[str, Any] = {"label": variant.label, "note": variant.note}
    measure = partial(token_nll, model, batch_tokens=BATCH_TOKENS)
    path = records / f"ppl-{variant.label}.jsonl"
    documents = held_out(work, settings.split)
    run_ppl(measure, tokenizer, ppl, documents=documents, out=path, model_info=identity, **named)
    answerer = LocalAnswerer(model, tokenizer, identity=identity, batch_tokens=BATCH_TOKENS)
    for name, measured in tasks.items():
        path = records / f"{name}-{variant.label}.jsonl"
        run_task(measured.task, answerer, tokenizer=tokenizer, out=path, **named)
