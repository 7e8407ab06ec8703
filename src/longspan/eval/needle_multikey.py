"""Multi-key needle: one context with a needle of its own key at every depth, each asked for by itself.

All questions of a context share all that stands before them, so it is read once for the whole row of depths.
That is another and harder task than a single needle: the other needles are distractors of the very form that
is asked for. Its name and records are its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.core.errors import ConfigError
from longspan.core.seeds import rng
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.needle import Context, Facts, NeedleTask
from longspan.eval.needle_config import NeedleConfig
from longspan.eval.prompts import PromptForm
from longspan.eval.task import Built, Planned


class MultiKeyTask(NeedleTask):
    """The multi-key needle evaluation; arguments are those of `NeedleTask`.

    Raises:
        ConfigError: needles without a key, or several needles a question.
    """

    def __init__(
        self, settings: NeedleConfig, documents: Sequence[HeldOutDocument], form: PromptForm
    ) -> None:
        if "key" not in settings.template(settings.needle) & settings.template(settings.question):
            raise ConfigError(
                "a needle at every depth needs a {key} in needle and question, to tell them apart"
            )
        if settings.num_needles > 1:
            raise ConfigError(
                "the multi-key task has one needle at each depth",
                found=f"num_needles: {settings.num_needles}",
            )
        if settings.original is not None:
            raise ConfigError(
                "a test to the letter of its original has one needle", found="--multi-key with --exact"
            )
        self._prepare(settings, documents, form, len(settings.depths))
        self.name = "needle_multikey"
        self._row: tuple[tuple[int, int], Context, list[Facts]] | None = None

    def build(self, planned: Planned) -> Built:
        """Compose one sample, a pure function of the settings and its key. Raises DataError."""
        length, depth, number = int(planned.key[0]), float(planned.key[1]), int(planned.key[2])
        context, needles = self._context(length, number)
        index = self.settings.depths.index(depth)
        return self._composer.built(context, index, [needles[index]])

    def _context(self, length: int, number: int) -> tuple[Context, list[Facts]]:
        """Return the context that all depths share; the last one is kept."""
        if self._row is None or self._row[0] != (length, number):
            settings, composer = self.settings, self._composer
            sample = composer.sample(number)
            generator = rng(settings.seed, "needle multikey", length, number)
            needles = composer.draw_needles(generator, sample, len(settings.depths))
            distractors = composer.draw_distractors(generator, sample, needles)
            insertions = [composer.needle(each, depth) for each, depth in zip(needles, settings.depths)]
            insertions += composer.distractors(distractors, generator.random(len(distractors)).tolist())
            # The longest question decides how long the text can be that all of them share.
            longest = max(needles, key=lambda each: composer.count("", [each]))
            context = composer.context(sample, length, insertions, asked=[longest], exact=None)
            self._row = (length, number), context, needles
        return self._row[1], self._row[2]
