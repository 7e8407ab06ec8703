"""What a model finds and predicts, as records in a run folder: `longspan eval` as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.core.config import Config
from longspan.core.errors import ArgumentError, DataError
from longspan.core.places import load_place
from longspan.eval.held_out import HeldOutDocument, TaskDataConfig
from longspan.eval.ppl import PplConfig
from longspan.eval.prompts import PromptConfig, PromptForm
from longspan.eval.registry import TaskEntry, entries
from longspan.eval.runner import TooLong
from longspan.eval.task import Task
from longspan.eval.until_width import check_width
from longspan.infer.config import AnswererConfig
from longspan.steps.opening import AskedModel, form_of, opened

if TYPE_CHECKING:
    from longspan.data.exchange.token_documents import TokenDocuments

__all__ = ["evaluate_model", "task_of"]

PPL = "longspan.eval.ppl:PplConfig"


def evaluate_model(
    model: str | Path | Mapping[str, Any] | AnswererConfig,
    task: str,
    out: str | Path,
    config: Config | None = None,
    *,
    data: str | Path | Sequence[str | Path] | TaskDataConfig = (),
    prompts: Mapping[str, Any] | PromptConfig | None = None,
    note: str | None = None,
    used: Mapping[str, Any] | None = None,
    retry_unscored: bool = False,
    too_long: TooLong = "refuse",
    until_width: float | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a model with one task; write a record a sample below `out/records`, return the summary.

    A sample that is recorded already is not asked again. Where torchrun or srun started several processes, this returns
    in the first alone: the others work for it, and end here with SystemExit.

    Args:
        model: a folder of our training (run, stage, checkpoint, adapter), a Hugging Face folder or hub name,
            "openai:NAME" behind a server; or fields of an `AnswererConfig`, as `{"model": "run", "label": "after"}`.
        task: a name that `longspan eval list` shows: needle, passkey, ruler, ppl and others.
        config: the task's settings. Its fields may also be given as keywords: `lengths=(1024, 4096), samples=4`.
        data: texts that training did not see: files, folders, patterns. Default: the task's own.
        prompts: how prompts are put: `{"bos": "never"}`.
        note: a remark for readers of the records.
        used: what the records say was asked for. None: the settings.
        retry_unscored: ask again for recorded samples that have no score.
        too_long: contexts over the model's `max_length`: an error, or samples recorded as unscored.
        until_width: ask no more samples of a length (or what the task's columns are) once the 95 % interval of its
            mean is no wider, from end to end: 0.05 is 5 points. Not of ppl.

    Returns:
        What `eval.runner.run_task` and the task sum up: samples, scored, mean, interval, records (the path) and more;
        of ppl `by_length`, the perplexity of each source and length.

    Raises:
        ArgumentError: there is no such task, or it does not go with this model.
        ConfigError: settings that do not fit one another, the model, or the records in `out`.
        DataError: the model, its tokenizer or the data cannot be read.
        MissingDependencyError: a package that the model or the task needs is not installed.
        RunError: the disk is full, or a process or server is gone.
    """
    entry = _entry(task)
    check_width(until_width)
    asks = model if isinstance(model, AnswererConfig) else AnswererConfig.from_dict(_named(model))
    puts = prompts if isinstance(prompts, PromptConfig) else PromptConfig.from_dict(dict(prompts or {}))
    reads = data if isinstance(data, TaskDataConfig) else TaskDataConfig(paths=_paths(data))
    config = _config(task, entry, config, settings)
    if used is None:
        used = {**puts.to_dict(), **asks.to_dict(), **reads.to_dict(), **config.to_dict()}
    if task == "ppl":
        if until_width is not None:
            raise ArgumentError(
                "until_width is for tasks with scores between 0 and 1", found="ppl", fix="leave it out"
            )
        assert isinstance(config, PplConfig)
        return _perplexity(asks, config, reads, Path(out), note=note, used=used)
    if "cache" in entry.reads:
        cache = reads.cache or str(Path(out) / f"{task}-samples")
        reads = reads.model_copy(update={"cache": cache})
    form = form_of(asks, puts)
    made = task_of(entry, config, reads, form)
    _check_name(made, task, entry)
    with opened(asks, puts, tokenizer=form.tokenizer) as asked:
        _shake_hands(asked, asks, form, made)
        return asked.run(
            made,
            Path(out),
            note=note,
            used=used,
            retry_unscored=retry_unscored,
            too_long=too_long,
            until_width=until_width,
        )


def _shake_hands(asked: AskedModel, model: AnswererConfig, form: PromptForm, task: Task) -> None:
    """Ask a server that a user has started once, before the run."""
    if not model.is_remote or model.server is None or not model.server.base_url:
        return
    from longspan.infer.handshake import ANSWER_TOKENS, BEGUN, GREETING, shake_hands
    from longspan.infer.remote import RemoteAnswerer

    assert isinstance(asked.answerer, RemoteAnswerer)
    begun = BEGUN if model.server.continue_final_message else ""
    request = form.request(GREETING, answer_prefix=begun)
    request = request._replace(max_new_tokens=ANSWER_TOKENS)
    shake_hands(asked.answerer, request, measures=task.mode == "teacher_forced")


def task_of(entry: TaskEntry, config: Config, data: TaskDataConfig, form: PromptForm) -> Task:
    """Return a task of the registry with such settings, its prompts put in a form."""
    return load_place(entry.task).from_config(config, data, form)


def _entry(task: str) -> TaskEntry:
    known = entries()
    runs = [name for name, entry in known.items() if entry.task or name == "ppl"]
    if task not in runs:
        raise ArgumentError("there is no such task", found=repr(task), allowed=runs)
    return known[task]


def _config(task: str, entry: TaskEntry, config: Config | None, settings: Mapping[str, Any]) -> Config:
    """Return the settings of a task, of which some may be given by name."""
    kind = load_place(entry.config or PPL)
    if config is not None and not isinstance(config, kind):
        raise ArgumentError(
            f"these are no settings of {task}", found=type(config).__name__, allowed=kind.__name__
        )
    given = {} if config is None else config.to_dict()
    made: Config = kind.from_dict({**given, **settings}, where=f"the settings of {task}")
    return made


def _check_name(made: Task, task: str, entry: TaskEntry) -> None:
    """Refuse settings of another task of the same command."""
    if entry.command and made.name != task:
        raise ArgumentError(
            f"these settings ask for {made.name}",
            found=task,
            fix=f"ask as `longspan eval {entry.command}` does",
        )


def _named(model: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    return dict(model) if isinstance(model, Mapping) else {"model": str(model)}


def _paths(data: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return (str(data),) if isinstance(data, str | Path) else tuple(map(str, data))


def _perplexity(
    model: AnswererConfig,
    config: PplConfig,
    data: TaskDataConfig,
    out: Path,
    *,
    note: str | None,
    used: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure perplexity with the losses that a model here gives."""
    if model.is_remote:
        raise ArgumentError(
            "servers do not say how likely a text is",
            found=model.model,
            allowed="models that are run here, with --cp or --tp where they are large",
        )
    if model.chat_template is not None:
        raise ArgumentError("perplexity is that of the text itself", fix="leave out --chat-template")
    from longspan.eval.ppl_run import run_ppl
    from longspan.infer.distributed import GivesLosses
    from longspan.infer.requests import copies_of

    documents = _documents(data)
    with opened(model) as asked:
        assert isinstance(asked.answerer, GivesLosses)
        _check_lengths(asked, config)
        return run_ppl(
            asked.answerer.token_nll,
            asked.tokenizer,
            config,
            documents=documents,
            label=asked.label,
            out=asked.records(out, "ppl"),
            model_info=asked.answerer.identity,
            note=note,
            used=used,
            batch_tokens=model.batch_tokens,
            copies=copies_of(asked.answerer),
        )


def _check_lengths(asked: AskedModel, config: PplConfig) -> None:
    """Refuse windows that are longer than the model is to be given."""
    most = asked.answerer.max_length
    if most is not None and not config.lengths:
        raise ArgumentError(
            "--cut full measures each document as a whole",
            found=f"--max-length {most}",
            fix=f"leave longer ones out with --max-tokens {most}, or cut them with --cut truncate",
        )
    if most is not None and max(config.lengths) > most:
        raise ArgumentError(
            "windows are longer than the model is to be given",
            found=f"{max(config.lengths)} tokens",
            allowed=f"--max-length {most}",
        )


def _documents(data: TaskDataConfig) -> Sequence[HeldOutDocument] | TokenDocuments:
    """Return the documents, or tokenised ones as they are. Raises DataError: some are texts and some are not."""
    from longspan.eval.ppl_documents import is_tokenised, open_tokenised

    tokenised = [is_tokenised(Path(each)) for each in data.named("documents")]
    if all(tokenised):
        return open_tokenised([Path(each) for each in data.paths])
    if any(tokenised):
        raise DataError("some inputs are tokenised and some are texts", fix="give one kind at a time")
    return data.documents()
