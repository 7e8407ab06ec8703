"""The models that are compared: before, after, what can be done without training, and controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import ConfigError
from longspan.core.files import read_json
from longspan.quickstart.base import BASE
from longspan.quickstart.config import QuickstartConfig
from longspan.train.config import StageConfig, TrainConfig

OF_CONTROLS = "of_controls"
"""Ends the names of what is made for controls alone: the main run is the same with and without them."""


class Control(NamedTuple):
    """A training run that differs from the main one in one thing, at equal tokens."""

    train: TrainConfig
    note: str


def controls(config: QuickstartConfig) -> dict[str, Control]:
    """Return the controls that a reader would ask for, with what each shows and does not show."""
    if config.pretrain is None:
        return _controls_of_pretrained(config.extend)
    return _controls_from_scratch(config.extend, config.pretrain)


def _controls_of_pretrained(main: TrainConfig) -> dict[str, Control]:
    """Return questions in rows of the first stage's length, text without questions, and text in such rows.

    Raises:
        ConfigError: the recipe's stages have no text beside the questions.
    """
    first = main.stages[0]
    length = first.context_length
    questions = {
        name: stream.model_copy(update={"records": tuple(map(_records_of_controls, stream.records))})
        if stream.records
        else stream
        for name, stream in first.streams.items()
    }
    # Rows that count on, in the model's own RoPE: neither reaches what short rows do not hold.
    short = [
        stage.model_copy(update={"context_length": length, "rope": None, "pose": None})
        for stage in main.stages
    ]
    changes: dict[str, tuple[list[StageConfig], str]] = {
        "ablate_short_rows": (
            [stage.model_copy(update={"streams": questions}) for stage in short],
            f"Questions in rows of {length}, with the main run's steps, tokens and rates. Shows what longer rows add.",
        ),
        "ablate_text_alone": (
            list(map(_text_alone, main.stages)),
            "Rows of the main run, without questions. Shows what questions add to more training on text.",
        ),
        "ablate_short_text": (
            list(map(_text_alone, short)),
            f"Text in rows of {length}, without questions. Shows what is more training of any kind.",
        ),
    }
    return {
        name: Control(main.model_copy(update={"stages": tuple(stages)}), note)
        for name, (stages, note) in changes.items()
    }


def _records_of_controls(path: str) -> str:
    """Return where the controls have what the main run has at `questions/...`."""
    return path.replace("questions/", f"questions_{OF_CONTROLS}/", 1)


def _text_alone(stage: StageConfig) -> StageConfig:
    text = {name: stream for name, stream in stage.streams.items() if stream.records is None}
    if not text:
        raise ConfigError(
            "a control trains on text alone, and a stage has none",
            found=f"{stage.name}: {', '.join(stage.streams)}",
            fix="give every stage a stream with a store, or leave ablate out",
        )
    return stage.model_copy(update={"objective": "lm", "max_epochs": 2, "streams": text})


def _controls_from_scratch(main: TrainConfig, pretrain: TrainConfig) -> dict[str, Control]:
    long = main.stages[-1]
    short = pretrain.stages[-1]
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "ablate_short_rows": (
            {
                "context_length": short.context_length,
                "rope": short.rope,
                "streams": _short_streams(long, short),
            },
            f"The same number of further tokens in rows of {short.context_length}, theta unchanged. Shows how much is "
            "more training and not longer rows. Does not separate row length from theta.",
        ),
        "ablate_same_theta": (
            {"rope": short.rope},
            "Rows and data of the main run, theta unchanged. Shows what raising theta adds once the rows are long. "
            "One theta only was tried.",
        ),
        "ablate_no_upsampling": (
            {"streams": _without_upsampling(long)},
            "Rows and theta of the main run, documents of every length kept as they come. Shows what length "
            "upsampling adds on this corpus, where packages of code are long already; says nothing of web text.",
        ),
    }
    return {
        name: Control(main.model_copy(update={"stages": (long.model_copy(update=change),)}), note)
        for name, (change, note) in changes.items()
    }


def _short_streams(long: StageConfig, short: StageConfig) -> dict[str, Any]:
    """Return the streams of the short stage at the weights of the long one; recall keeps its share."""
    total = sum(stream.weight for stream in long.streams.values())
    text = long.streams["text"].weight / total
    weights = {"text": text, "recall": 1 - text}
    streams = {
        name: stream.model_copy(update={"weight": weights[name]}) for name, stream in short.streams.items()
    }
    streams["recall"] = streams["recall"].model_copy(update={"store": f"stores/recall_{OF_CONTROLS}"})
    return streams


def _without_upsampling(long: StageConfig) -> dict[str, Any]:
    text = long.streams["text"]
    plain = text.mixture.model_copy(
        update={"mode": "none", "keep_short": None, "tokens": None, "max_repeat": 1}
    )
    return {**long.streams, "text": text.model_copy(update={"mixture": plain})}


class Variant(NamedTuple):
    """A model to evaluate: a folder, and a RoPE that differs from the one it was saved with."""

    label: str
    path: Path
    trained_length: int
    rope: dict[str, Any] | None = None
    note: str | None = None


def variants(work: Path, config: QuickstartConfig) -> list[Variant]:
    """Return before, after, what can be done without training (a RoPE alone), and controls."""
    positions = 0
    if config.pretrain is None:
        positions = read_json(work / BASE / "config.json")["max_position_embeddings"]

    def trained(label: str, run: str, train: TrainConfig, **differs: Any) -> Variant:
        last = train.stages[-1]
        # Rows may be shorter than what the pretrained model has learnt before.
        return Variant(label, work / run / "stages" / last.name, max(positions, last.reach), **differs)

    long = config.extend.stages[-1]
    if config.pretrain is None:
        before = Variant("before", work / BASE, positions)
    else:
        before = trained("before", "pretrain", config.pretrain)
    factor = long.reach / before.trained_length
    methods: dict[str, Any] = {
        "theta_only": long.rope,
        "ntk": {"rope_type": "ntk", "factor": factor},
        "pi": {"rope_type": "linear", "factor": factor},
        "yarn": {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": before.trained_length,
        },
    }
    return [
        before,
        trained("after", "extend", config.extend),
        *(before._replace(label=name, rope=methods[name]) for name in config.evaluation.methods),
        *(
            trained(name, name, control.train, note=control.note)
            for name, control in (controls(config) if config.ablate else {}).items()
        ),
    ]
