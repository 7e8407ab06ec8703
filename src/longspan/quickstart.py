"""The whole story on this machine, with nothing to download: raw text, a small model, a longer context, a report.

Read it from `run_quickstart` downwards; every step is a public piece that works the same at full size:

    corpus      three sources from what every CPython carries, split by document (data/texts/python_corpus.py)
    tokenizer   a small byte-level BPE                                          (data/tokenizer/)
    recall      real text with planted facts, asked back                        (data/texts/recall.py)
    tokenise    jsonl -> token stores and their length tables                   (data/tokenize/)
    pretrain    a Llama at 256 tokens                                           (train/trainer.py)
    extend      long documents upsampled, RoPE base raised, 2048 tokens         (train/trainer.py)
    evaluate    needle grid and perplexity: before, after, zero-shot methods    (eval/runner.py)
    report      one page, and results.json for machines                         (report/html.py)

Killed at any point and run again, it goes on from where it was.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic

from longspan.core.config import Config, apply_overrides, parse_yaml, read_yaml
from longspan.core.files import atomic_write, write_json
from longspan.core.log import get_logger
from longspan.core.records import read_jsonl
from longspan.core.rundir import RunDir
from longspan.core.seeds import derive_seed
from longspan.core.units import format_count
from longspan.data.store import TokenStore
from longspan.data.texts.facts import collect_keys
from longspan.data.texts.python_corpus import write_python_corpus
from longspan.data.texts.recall import RecallSet, RecallTexts, write_recall_corpus
from longspan.data.tokenize import tokenize_corpus
from longspan.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from longspan.eval.held_out import HeldOutDocument
from longspan.eval.needle_config import NeedleConfig
from longspan.eval.ppl import PplConfig
from longspan.train.config import StageConfig, TrainConfig

Preset = Literal["small", "tiny"]
RECIPES: dict[str, str] = {"small": "quickstart.yaml", "tiny": "quickstart-tiny.yaml"}


class TokenizerConfig(Config):
    """The tokenizer that is trained on the corpus."""

    vocab_size: int
    chars_per_document: int
    """Leading characters of each training document that the vocabulary is learnt from."""


class RecallConfig(Config):
    """One kind of training document with planted facts; see data/texts/recall.py."""

    tokens: int | tuple[int, int]
    """Length, or (shortest, longest)."""
    max_facts: int
    answer_weight: int
    far_bias: float = 0.0


class EvaluationConfig(Config):
    """What is measured, on documents and keys that training never saw."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    """Needle samples in each cell."""
    beyond: int
    """A length past the trained one, shown beside the grid and not part of its mean."""
    distractors: int
    """Other planted facts in the harder needle task."""
    ppl_spans: int = 16
    """Spans of the longest length per source for perplexity."""
    split: Literal["validation", "test"] = "test"
    """`test` is what is reported; recipes are chosen on `validation`."""


class QuickstartConfig(Config):
    """The exact recipe of a run."""

    seed: int = 0
    """Seed of every random choice."""
    corpus_chars: int | None = None
    """Characters per source; None takes all."""
    tokenizer: TokenizerConfig
    recall: dict[str, RecallConfig]
    pretrain: TrainConfig
    extend: TrainConfig
    evaluation: EvaluationConfig
    ablate: bool = False
    """Whether the controls are trained and evaluated too."""

    @pydantic.model_validator(mode="after")
    def _one_seed(self) -> QuickstartConfig:
        if {self.pretrain.seed, self.extend.seed} != {self.seed}:
            raise ValueError("the recipe has one seed: set it at the top")
        return self


def load_config(
    preset: Preset | Path = "small",
    *,
    seed: int | None = None,
    ablate: bool = False,
    overrides: Sequence[str] = (),
) -> QuickstartConfig:
    """Return the shipped recipe of a preset, or that of a file, with a seed (None: the file's, else 0)."""
    if isinstance(preset, Path):
        where, values = str(preset), read_yaml(preset)
    else:
        where = RECIPES[preset]
        text = (importlib.resources.files("longspan") / "recipes" / where).read_text(encoding="utf-8")
        values = parse_yaml(text, where=where)
    values = apply_overrides(values, overrides)
    values["ablate"] = ablate or values.get("ablate", False)
    values["seed"] = values.get("seed", 0) if seed is None else seed
    for part in ("pretrain", "extend"):
        if isinstance(values.get(part), dict):
            values[part]["seed"] = values["seed"]
    return QuickstartConfig.from_dict(values, where=where)


def run_quickstart(out: str | Path, config: QuickstartConfig) -> dict[str, Any]:
    """Run every phase that `out` does not hold yet; return what stands in `results.json`.

    Raises:
        ConfigError: `out` holds a run of another recipe.
        RunError: the disk is full.
    """
    run = RunDir.create(out, config, seed=config.seed)
    work = run.path
    with run.phase("corpus"):
        if not (work / "corpus").exists():
            counts = write_python_corpus(work / "corpus", max_chars=config.corpus_chars)
            get_logger("quickstart").info("corpus: %s", json.dumps(counts))
    with run.phase("tokenizer"):
        tokenizer = _tokenizer(work, config)
    with run.phase("tokenise"):
        _tokenise(work, config, tokenizer)
    from longspan.train.trainer import train

    trainings = {"pretrain": config.pretrain, "extend": config.extend}
    if config.ablate:
        trainings |= {name: control.train for name, control in controls(config).items()}
    for name, recipe in trainings.items():
        with run.phase(name):
            if not RunDir(work / name).is_complete:
                train(recipe, work / name, data_root=work)
    with run.phase("evaluate"):
        _evaluate(work, config, tokenizer)
    with run.phase("report"):
        _gather(work, config)
        from longspan.report.html import write_report

        write_report([work], work / "report.html")
    results = _results(run, config)
    write_json(work / "results.json", results)
    run.mark_complete()
    return results


# -- data ----------------------------------------------------------------------------------------------------


RECALL_OF_CONTROLS = "recall_of_controls"
SOURCES = ("code", "reference", "docstrings")


def corpus_texts(work: Path, split: str, sources: Sequence[str] = SOURCES) -> Iterator[dict[str, Any]]:
    """Yield the records of a split of the corpus."""
    for source in sources:
        path = work / "corpus" / split / f"{source}.jsonl"
        if path.exists():
            yield from read_jsonl(path)


def _tokenizer(work: Path, config: QuickstartConfig) -> Tokenizer:
    folder = work / "tokenizer"
    if not folder.exists():
        limit = config.tokenizer.chars_per_document
        texts = (record["text"][:limit] for record in corpus_texts(work, "train"))
        train_bpe(texts, folder, vocab_size=config.tokenizer.vocab_size)
    return load_tokenizer(folder)


def _tokenise(work: Path, config: QuickstartConfig, tokenizer: Tokenizer) -> None:
    """Make the two token stores and the length tables that the report shows."""
    stores = work / "stores"
    text_store = tokenize_corpus(
        [str(work / "corpus" / "train")], tokenizer, stores / "text", source_field="source"
    )
    _make_recall(work, "recall", config, tokenizer, [config.pretrain, config.extend], seed=config.seed)
    if config.ablate:
        # Documents of their own: the main run is the same with and without controls.
        trains = [control.train for control in controls(config).values()]
        seed = derive_seed(config.seed, "controls")
        _make_recall(work, RECALL_OF_CONTROLS, config, tokenizer, trains, seed=seed)
    summary = text_store.lengths.summary("before", "The corpus as it is")
    write_json(work / "lengths" / "before.json", summary)
    log = get_logger("quickstart")
    log.info(
        "%-12s %9s %10s %7s %7s %7s  %s", "source", "documents", "tokens", "p50", "p90", "max", "in > 4K"
    )
    for name, row in summary["sources"].items():
        p50, p90, longest = (format_count(row["quantiles"][key]) for key in ("p50", "p90", "max"))
        log.info(
            "%-12s %9s %10s %7s %7s %7s  %.0f%%",
            *(name, format_count(row["documents"]), format_count(row["tokens"]), p50, p90, longest),
            100 * row["share_above"]["4096"],
        )


def _make_recall(
    work: Path,
    name: str,
    config: QuickstartConfig,
    tokenizer: Tokenizer,
    trains: Sequence[TrainConfig],
    *,
    seed: int,
) -> None:
    """Make the store `stores/<name>` with the recall documents that some trainings will use."""
    if not (work / f"{name}.jsonl").exists():
        # Short texts are too short to be filler; code and reference are long.
        texts = [record["text"] for record in corpus_texts(work, "train", ("code", "reference"))]
        write_recall_corpus(
            work / f"{name}.jsonl",
            texts,
            collect_keys(texts, split="train"),
            _recall_sets(config, name, trains),
            count_tokens=lambda text: len(tokenizer.encode(text)),
            seed=seed,
        )
    tokenize_corpus([str(work / f"{name}.jsonl")], tokenizer, work / "stores" / name, source_field="source")


def _recall_sets(config: QuickstartConfig, name: str, trains: Sequence[TrainConfig]) -> list[RecallSet]:
    """Return how many documents of each kind `trains` take from a store: one a row, so that none is repeated."""
    documents: dict[str, float] = {}
    for stage in (stage for train in trains for stage in train.stages):
        total = sum(stream.weight for stream in stage.streams.values())
        for stream in stage.streams.values():
            if stream.store == f"stores/{name}":
                rows = stage.num_steps * stage.rows_per_step * stream.weight / total
                for source in stream.mixture.sources or ():
                    lengths = config.recall[source].tokens
                    mean = lengths if isinstance(lengths, int) else sum(lengths) / 2
                    needed = rows * max(1.0, stage.context_length / mean)
                    documents[source] = max(documents.get(source, 0), needed)
    return [
        RecallSet(
            source,
            round(1.1 * documents[source]) + 8,
            kind.tokens,
            RecallTexts(1, kind.max_facts, far_bias=kind.far_bias, answer_weight=kind.answer_weight),
        )
        for source, kind in config.recall.items()
        if source in documents
    ]


def _held_out(work: Path, split: str) -> list[HeldOutDocument]:
    return [
        HeldOutDocument(f"{record['source']}/{record['name']}", record["text"], record["source"])
        for record in corpus_texts(work, split)
    ]


# -- models --------------------------------------------------------------------------------------------------


class Control(NamedTuple):
    """A training run that differs from the main one in one thing, at equal tokens."""

    train: TrainConfig
    note: str


def controls(config: QuickstartConfig) -> dict[str, Control]:
    """Return the controls that a reader would ask for, with what each shows and does not show."""
    main = config.extend
    long = main.stages[-1]
    short = config.pretrain.stages[-1]
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
    streams["recall"] = streams["recall"].model_copy(update={"store": f"stores/{RECALL_OF_CONTROLS}"})
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


def _variants(work: Path, config: QuickstartConfig) -> list[Variant]:
    """Return before, after, what can be done without training (theta alone, NTK, position interpolation), controls."""

    def trained(label: str, run: str, train: TrainConfig, **differs: Any) -> Variant:
        last = train.stages[-1]
        return Variant(label, work / run / "stages" / last.name, last.context_length, **differs)

    short, long = config.pretrain.stages[-1], config.extend.stages[-1]
    factor = long.context_length / short.context_length
    before = trained("before", "pretrain", config.pretrain)
    return [
        before,
        trained("after", "extend", config.extend),
        before._replace(label="theta_only", rope=long.rope),
        before._replace(label="ntk", rope={"rope_type": "ntk", "factor": factor}),
        before._replace(label="pi", rope={"rope_type": "linear", "factor": factor}),
        *(
            trained(name, name, control.train, note=control.note)
            for name, control in (controls(config) if config.ablate else {}).items()
        ),
    ]


# -- evaluation ----------------------------------------------------------------------------------------------


def _evaluate(work: Path, config: QuickstartConfig, tokenizer: Tokenizer) -> None:
    """Write the records of every variant; those that are there already are not made again."""
    settings = config.evaluation
    documents = _held_out(work, settings.split)
    needle = NeedleConfig(
        lengths=settings.lengths,
        depths=settings.depths,
        samples=settings.samples,
        seed=config.seed,
        key_split=settings.split,
        split=settings.split,
    )
    beyond = needle.model_copy(update={"lengths": (settings.beyond,)})
    harder = needle.model_copy(update={"num_distractors": settings.distractors})
    ppl = PplConfig(
        lengths=settings.lengths, num_spans=settings.ppl_spans, seed=config.seed, split=settings.split
    )
    for variant in _variants(work, config):
        grids = {"needle": needle}
        if variant.label in ("before", "after"):
            grids["needle_beyond"] = beyond
        if variant.label == "after":
            grids["needle_distractors"] = harder
        _evaluate_variant(work, variant, tokenizer, documents, ppl, grids)


def _evaluate_variant(
    work: Path,
    variant: Variant,
    tokenizer: Tokenizer,
    documents: Sequence[HeldOutDocument],
    ppl: PplConfig,
    grids: Mapping[str, NeedleConfig],
) -> None:
    from longspan.eval.needle import NeedleTask
    from longspan.eval.ppl_run import BATCH_TOKENS, run_ppl
    from longspan.eval.prompts import PromptForm
    from longspan.eval.runner import run_task
    from longspan.infer.local import LocalAnswerer
    from longspan.infer.perplexity import token_nll
    from longspan.models.hf import evaluated_dtype, load_model, usable_device
    from longspan.models.identity import model_identity

    records = work / "records"
    longest = max(length for grid in grids.values() for length in grid.lengths)
    dtype = evaluated_dtype(variant.path, usable_device())
    model = load_model(variant.path, rope=variant.rope, max_position_embeddings=longest, dtype=dtype)
    model = model.to(usable_device()).eval()
    identity = {
        **model_identity(model, variant.path, shown_as=str(variant.path.relative_to(work))),
        "trained_length": variant.trained_length,
    }
    named: dict[str, Any] = {"label": variant.label, "note": variant.note}
    measure = partial(token_nll, model, batch_tokens=BATCH_TOKENS)
    path = records / f"ppl-{variant.label}.jsonl"
    run_ppl(measure, tokenizer, ppl, documents=documents, out=path, model_info=identity, **named)
    answerer = LocalAnswerer(model, tokenizer, identity=identity, batch_tokens=BATCH_TOKENS)
    for name, grid in grids.items():
        task = NeedleTask(grid, documents, PromptForm(tokenizer))
        path = records / f"{name}-{variant.label}.jsonl"
        run_task(task, answerer, tokenizer=tokenizer, out=path, **named)


# -- results -------------------------------------------------------------------------------------------------


def _gather(work: Path, config: QuickstartConfig) -> None:
    """Put the training curves of both runs and the lengths after upsampling where the report looks.

    The curriculum's kinds of recall follow one another, so they make one curve.
    """
    short = {
        name for stage in config.pretrain.stages for name in stage.streams["recall"].mixture.sources or ()
    }
    with atomic_write(work / "metrics.jsonl", "w") as file:
        before: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
        for name in ("pretrain", "extend"):
            shifted = before
            for record in read_jsonl(work / name / "metrics.jsonl"):
                shifted = {**record, **{key: record[key] + before[key] for key in before}}
                by_source = record["loss_by_source"].items()
                shifted["loss_by_source"] = {"recall-short" if k in short else k: v for k, v in by_source}
                file.write(json.dumps(shifted) + "\n")
            before = {key: shifted[key] for key in before}
    from longspan.data.plans.mixture import plan_mixture

    text = config.extend.stages[-1].streams["text"]
    store = TokenStore(work / str(text.store))
    documents = plan_mixture(text.mixture, store.lengths, config.seed).documents
    summary = store.lengths.summary(
        "after_upsampling", "What the extension is trained on: long documents upsampled", documents=documents
    )
    write_json(work / "lengths" / "after_upsampling.json", summary)


def _results(run: RunDir, config: QuickstartConfig) -> dict[str, Any]:
    """Return the figures for machines, from the records alone; lengths past the trained one stand apart."""
    from longspan.report.load import load_run
    from longspan.report.summary import summarise

    inside = set(config.evaluation.lengths)
    loaded = load_run(run.path)
    kept = [
        replace(file, samples=tuple(sample for sample in file.samples if sample.length in inside))
        if file.task == "needle"
        else file
        for file in loaded.records
    ]
    summary = summarise(replace(loaded, records=kept))
    beyond = {
        label: past
        for label, table in summarise(loaded)["needle"].items()
        if (
            past := {length: mean for length, mean in table["by_length"].items() if int(length) not in inside}
        )
    }
    seconds = run.phase_seconds()
    seconds["total"] = round(sum(seconds.values()), 2)
    return {"seed": config.seed, **summary, "needle_beyond": beyond, "seconds": seconds}
