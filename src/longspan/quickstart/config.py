"""The recipe of a quickstart: which model, which texts, how it is trained and measured."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from longspan.core.config import Config, Length, apply_overrides, parse_yaml, read_yaml
from longspan.core.errors import ArgumentError
from longspan.eval.ruler.task import RulerConfig
from longspan.train.config import TrainConfig

Preset = Literal["small", "tiny", "real"]
RECIPES: dict[str, str] = {
    "small": "quickstart.yaml",
    "tiny": "quickstart-tiny.yaml",
    "real": "quickstart-real.yaml",
}
Method = Literal["theta_only", "ntk", "pi", "yarn"]


class BaseConfig(Config):
    """A pretrained model that is extended, in the place of one that is trained from scratch."""

    model: str
    """Hugging Face folder or hub name."""
    package: str | None = None
    """Where the hub does not have it, or cannot be reached: the same model out of the Python package index, a name of
    `models.packaged`. None: nowhere else."""


class TokenizerConfig(Config):
    """The tokenizer that is trained on the corpus."""

    vocab_size: int
    chars_per_document: int
    """Leading characters of each training document that the vocabulary is learnt from."""


class RecallConfig(Config):
    """One kind of training document with planted facts; see data/texts/recall.py."""

    tokens: Length | tuple[Length, Length]
    """Length, or (shortest, longest)."""
    max_facts: int
    answer_weight: int
    far_bias: float = 0.0


class QuestionsConfig(Config):
    """One kind of conversation: a text, and questions on it in several turns. No model writes them; see
    synth/offline.py. So many are made as the stages that read `questions/NAME/train.jsonl` have rows: none where no
    stage does."""

    length: Length
    """Tokens of a conversation at most."""
    questions: pydantic.PositiveInt
    """Of each conversation; the evidence is even over depth in all of them together."""
    question_set: Literal["offline", "offline_sentences", "offline_chains"] = "offline_sentences"
    """What is asked, of the sets that ask no model. With bare numbers (`offline`) a model got worse where it writes the
    whole answer: benchmarks/real.md."""
    apart: bool = False
    """Ask each question on its own behind the text, and not one after another; see `ConversationConfig.apart`."""

    ADDED_LATER = frozenset({"question_set"})


class EvaluationConfig(Config):
    """What is measured, on documents and keys that training never saw."""

    lengths: tuple[Length, ...]
    depths: tuple[float, ...]
    samples: int
    """Needle samples in each cell."""
    beyond: Length | None = None
    """A length past that of the rows, shown beside the grid and not part of its mean. None: none."""
    distractors: int = 0
    """Other planted facts in the harder needle task, which the model is asked after training. 0: not asked."""
    ppl_lengths: tuple[Length, ...] = ()
    """Windows of perplexity. None: `lengths`."""
    ppl_spans: int = 16
    """Spans of the longest length per source for perplexity."""
    seed: int | None = None
    """Of what is asked; one number for runs of several seeds asks them all the same. None: the seed of the run."""
    split: Literal["validation", "test"] = "test"
    """`test` is what is reported; recipes are chosen on `validation`."""
    chat: bool = False
    """Ask needles and RULER in the model's own chat, where it writes its answers, the whole of them."""
    essays: bool = False
    """Measure on the essays of the published needle test, which no training reads; from the package index. Where it
    cannot be reached, which is said, on the corpus as otherwise."""
    ruler: RulerConfig | None = None
    """RULER's subtasks before and after. None: none."""
    methods: tuple[Method, ...] = ("theta_only", "ntk", "pi")
    """What can be done without training: the base of the RoPE alone, NTK, position interpolation, YaRN."""


class QuickstartConfig(Config):
    """The exact recipe of a run."""

    seed: int = 0
    """Seed of every random choice."""
    base: BaseConfig | None = None
    """The pretrained model. None: one is trained from scratch, with `tokenizer`, `recall` and `pretrain`."""
    texts: tuple[str, ...] = ()
    """Long texts: files, folders, patterns. None: what every CPython carries."""
    corpus_chars: int | None = None
    """Characters per source; None takes all."""
    tokenizer: TokenizerConfig | None = None
    recall: dict[str, RecallConfig] = pydantic.Field(default_factory=dict)
    questions: dict[str, QuestionsConfig] = pydantic.Field(default_factory=dict)
    pretrain: TrainConfig | None = None
    extend: TrainConfig
    evaluation: EvaluationConfig
    ablate: bool = False
    """Whether the controls are trained and evaluated too."""
    export: bool = False
    """Write the model, adapters merged, to `exported`, as a folder that plain transformers loads."""

    @pydantic.model_validator(mode="after")
    def _one_seed(self) -> QuickstartConfig:
        trains = (self.extend,) if self.pretrain is None else (self.pretrain, self.extend)
        if {train.seed for train in trains} != {self.seed}:
            raise ValueError("the recipe has one seed: set it at the top")
        return self

    @pydantic.model_validator(mode="after")
    def _one_base(self) -> QuickstartConfig:
        scratch = {name: getattr(self, name) for name in ("tokenizer", "pretrain")}
        given = [name for name, value in scratch.items() if value is not None]
        given += ["recall"] if self.recall else []
        if self.base is None and len(given) < 3:
            raise ValueError(
                "a model from scratch needs tokenizer, recall and pretrain; a pretrained one is `base`"
            )
        if self.base is not None and given:
            raise ValueError(f"{given[0]} is of a model from scratch, and base names a pretrained one")
        return self

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """The trainings by the name of their run folder, without controls."""
        first = {} if self.pretrain is None else {"pretrain": self.pretrain}
        return {**first, "extend": self.extend}


def load_config(
    preset: Preset | Path = "small",
    *,
    seed: int | None = None,
    ablate: bool = False,
    budget: str | None = None,
    model: str | None = None,
    data: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> QuickstartConfig:
    """Return the shipped recipe of a preset, or that of a file, with a seed (None: the file's, else 0).

    Args:
        model: in the place of the recipe's pretrained one; a folder or hub name.
        data: long texts in the place of the recipe's.

    A recipe may hold smaller `budgets` by name: settings in the place of its own. `budget` chooses one.

    Raises:
        ArgumentError: the recipe has no such budget, or no pretrained model that another could stand for.
        ConfigError: the recipe is wrong.
    """
    if isinstance(preset, Path):
        where, values = str(preset), read_yaml(preset)
    else:
        where = RECIPES[preset]
        text = (importlib.resources.files("longspan") / "recipes" / where).read_text(encoding="utf-8")
        values = parse_yaml(text, where=where)
    budgets = values.pop("budgets", {})
    if budget is not None and budget not in budgets:
        raise ArgumentError(
            f"{where} has no budget {budget!r}",
            allowed=sorted(budgets)
            if budgets
            else "none: the presets small and tiny take minutes as they are",
        )
    if budget is not None:
        values = _merged(values, budgets[budget])
    values = _merged(values, _given(values, where, model, data))
    values = apply_overrides(values, overrides)
    values["ablate"] = ablate or values.get("ablate", False)
    values["seed"] = values.get("seed", 0) if seed is None else seed
    for part in ("pretrain", "extend"):
        if isinstance(values.get(part), dict):
            values[part]["seed"] = values["seed"]
    return QuickstartConfig.from_dict(values, where=where)


def _given(values: dict[str, Any], where: str, model: str | None, data: Sequence[str]) -> dict[str, Any]:
    """Return the settings that a model and texts of one's own are."""
    if (model is not None or data) and not isinstance(values.get("base"), dict):
        option = "--data" if model is None else "--model"
        raise ArgumentError(
            f"{option} has no effect: {where} trains a model from scratch on its own texts",
            fix="add --preset real",
        )
    changes: dict[str, Any] = {}
    if model is not None:
        changes["base"] = {"model": model, "package": None}
    if data:
        changes["texts"] = list(data)
    return changes


def _merged(values: Any, changes: Any) -> Any:
    """Return settings with some in the place of their own; lists are replaced whole."""
    if not isinstance(values, dict) or not isinstance(changes, dict):
        return changes
    return {**values, **{name: _merged(values.get(name), change) for name, change in changes.items()}}
