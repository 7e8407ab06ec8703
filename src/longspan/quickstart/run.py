"""The phases of a quickstart, one after another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from longspan.core.files import atomic_write, write_json
from longspan.core.log import get_logger
from longspan.core.records import read_jsonl
from longspan.core.rundir import RunDir
from longspan.core.seeds import derive_seed
from longspan.data.store import TokenStore
from longspan.quickstart.base import make_base, the_tokenizer
from longspan.quickstart.config import QuickstartConfig
from longspan.quickstart.measure import evaluate
from longspan.quickstart.texts import make_questions, make_recall, tokenise, write_corpus
from longspan.quickstart.variants import OF_CONTROLS, controls

EXPORTED = "exported"
"""Folder of the model that plain transformers loads, in the run."""


def run_quickstart(out: str | Path, config: QuickstartConfig) -> dict[str, Any]:
    """Run every phase that `out` does not hold yet; return what stands in `results.json`.

    Raises:
        ConfigError: `out` holds a run of another recipe.
        RunError: the disk is full.
    """
    config = _on_this_machine(config)
    ablations = controls(config) if config.ablate else {}
    of_controls = [control.train for control in ablations.values()]
    run = RunDir.create(out, config, seed=config.seed)
    work = run.path
    if config.base is not None:
        with run.phase("base"):
            make_base(run, config.base)
    with run.phase("corpus"):
        write_corpus(work, config)
    with run.phase("tokenizer"):
        tokenizer = the_tokenizer(work, config)
    # Controls have documents of their own: the main run is the same with and without them.
    seed = derive_seed(config.seed, "controls")
    with run.phase("tokenise"):
        tokenise(work, tokenizer)
        if config.recall:
            trains = list(config.trainings.values())
            make_recall(work, "recall", config, tokenizer, trains, seed=config.seed)
            if ablations:
                make_recall(work, f"recall_{OF_CONTROLS}", config, tokenizer, of_controls, seed=seed)
    if config.questions:
        with run.phase("questions"):
            make_questions(work, "questions", config, tokenizer, [config.extend], seed=config.seed)
            if ablations:
                make_questions(work, f"questions_{OF_CONTROLS}", config, tokenizer, of_controls, seed=seed)
    from longspan.train.trainer import train

    trainings = config.trainings | {name: control.train for name, control in ablations.items()}
    for name, recipe in trainings.items():
        with run.phase(name):
            if not RunDir(work / name).is_complete:
                train(recipe, work / name, data_root=work)
    if config.export:
        with run.phase("export"):
            _export(work, config)
    with run.phase("evaluate"):
        evaluate(work, config, tokenizer)
    with run.phase("report"):
        _gather(work, config)
        from longspan.report.html import write_report

        write_report([work], work / "report.html")
    results = _results(run, config)
    write_json(work / "results.json", results)
    run.mark_complete()
    return results


def _on_this_machine(config: QuickstartConfig) -> QuickstartConfig:
    """Return the recipe in float32 where it asks for bfloat16 and the machine would only emulate it."""
    from longspan.train.runtime import emulates_bfloat16

    if not emulates_bfloat16(config.extend):
        return config
    get_logger("quickstart").warning(
        "trained in float32: this CPU has no instructions for bfloat16. It takes longer and twice the memory."
    )
    extend = config.extend
    wide = {
        "memory": extend.memory.model_copy(update={"compute_dtype": "float32"}),
        "model": extend.model.model_copy(update={"dtype": "float32"}),
    }
    return config.model_copy(update={"extend": extend.model_copy(update=wide)})


def _export(work: Path, config: QuickstartConfig) -> None:
    """Write the last stage's model as a folder of its own."""
    from longspan.models.export import export_model
    from longspan.models.hf import load_model
    from longspan.models.places import tokenizer_home

    if (work / EXPORTED).exists():
        return
    stage = work / "extend" / "stages" / config.extend.stages[-1].name
    home = tokenizer_home(stage)
    export_model(load_model(stage), work / EXPORTED, tokenizer=home, generation=home)


def _gather(work: Path, config: QuickstartConfig) -> None:
    """Put the training curves of all trainings and the lengths after upsampling where the report looks.

    The curriculum's kinds of recall follow one another, so they make one curve.
    """
    short = {
        name
        for stage in (config.pretrain.stages if config.pretrain else ())
        for name in stage.streams["recall"].mixture.sources or ()
    }
    with atomic_write(work / "metrics.jsonl", "w") as file:
        before: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
        for name in config.trainings:
            shifted = before
            for record in read_jsonl(work / name / "metrics.jsonl"):
                shifted = {**record, **{key: record[key] + before[key] for key in before}}
                by_source = record["loss_by_source"].items()
                shifted["loss_by_source"] = {"recall-short" if k in short else k: v for k, v in by_source}
                file.write(json.dumps(shifted) + "\n")
            before = {key: shifted[key] for key in before}
    from longspan.data.plans.mixture import plan_mixture

    text = config.extend.stages[-1].streams.get("text")
    if text is None or text.store is None:
        return
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
