"""A model that is to be asked: where it is found, and how it is opened.

with opened(AnswererConfig(model="run"), PromptConfig()) as asked:
    asked.answerer.generate(...)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from longspan.api import ServerConfig
    from longspan.data.tokenizer import Tokenizer
    from longspan.eval.prompts import PromptConfig, PromptForm
    from longspan.eval.task import Task
    from longspan.infer.config import AnswererConfig
    from longspan.infer.opening import Load
    from longspan.infer.requests import Answerer


class AskedModel(NamedTuple):
    """A model that was opened."""

    answerer: Answerer
    tokenizer: Tokenizer
    label: str
    """Name in reports, part of file names."""

    def records(self, out: Path, task: str) -> Path:
        """Return the file that the records of a task go to."""
        return out / "records" / f"{task}-{self.label}.jsonl"

    def run(self, task: Task, out: Path, **how: Any) -> dict[str, Any]:
        """Ask a task, with its records in a run folder; `how` and the summary are those of `run_task`."""
        from longspan.eval.runner import run_task

        records = self.records(out, task.name)
        return run_task(task, self.answerer, tokenizer=self.tokenizer, label=self.label, out=records, **how)


def form_of(options: AnswererConfig, prompts: PromptConfig) -> PromptForm:
    """Return how prompts are put to the model that is named."""
    from longspan.eval.prompts import PromptForm

    server = options.server if options.is_remote else None
    return PromptForm(
        find_tokenizer(options),
        bos=prompts.bos,
        chat_template=options.chat_template,
        template_args=prompts.template_args,
        thinking=prompts.thinking,
        max_new_tokens=prompts.max_new_tokens,
        chat_server=options.is_chat_server,
        continues=server is not None and server.continue_final_message,
    )


def _told(options: AnswererConfig, prompts: PromptConfig | None) -> ServerConfig | None:
    """Return how the server is asked, with what it has to tell its chat template."""
    from longspan.api import ServerConfig
    from longspan.core.errors import ArgumentError
    from longspan.eval.thinking_templates import template_variables

    server = options.server
    if prompts is None or not options.is_chat_server:
        return server
    # The provider itself refuses fields that it does not know.
    own = options.model.startswith("openai:") and server is not None and server.base_url
    variables = template_variables(prompts.thinking if own else "auto", prompts.template_args)
    if not variables:
        return server
    if not own:
        raise ArgumentError(
            "this provider takes no variables of a chat template",
            found="--template-args",
            fix="say it in the provider's own words: --server '{extra: {...}}'",
        )
    server = server or ServerConfig()
    extra = dict(server.extra)
    extra["chat_template_kwargs"] = {**variables, **(extra.get("chat_template_kwargs") or {})}
    return server.model_copy(update={"extra": extra})


@contextlib.contextmanager
def opened(
    options: AnswererConfig, prompts: PromptConfig | None = None, *, tokenizer: Tokenizer | None = None
) -> Iterator[AskedModel]:
    """Open the model that the options name, and close it in the end; `prompts`: how it is asked.

    `tokenizer` is the model's (`find_tokenizer`), where it has been loaded already.

    With several processes this returns in the first alone: the others follow its commands and end here.
    """
    from longspan.infer.opening import open_answerer

    tokenizer = tokenizer or find_tokenizer(options)
    label = label_of(options)
    # What is filled in here has no need of the checks that what was given has passed.
    config = options.model_copy(update={"replicas": replicas_of(options), "server": _told(options, prompts)})
    load = None
    if not options.is_remote:
        config, load = find_weights(config)
    if config.serve is not None:
        with _served(config, tokenizer) as served:
            yield AskedModel(served, tokenizer, label)
        return
    answerer = open_answerer(config, tokenizer=tokenizer, load=load)
    try:
        yield AskedModel(answerer, tokenizer, label)
    finally:
        answerer.close()


@contextlib.contextmanager
def _served(config: AnswererConfig, tokenizer: Tokenizer) -> Iterator[Answerer]:
    """Start a server for a model, and stop it in the end."""
    from longspan.core.errors import ArgumentError
    from longspan.infer.serving import served
    from longspan.models.hf import rope_settings
    from longspan.models.places import OWN_FILE

    if _is_checkpoint(config.model) or (Path(config.model) / OWN_FILE).is_file():
        raise ArgumentError(
            f"{config.model} is a {'checkpoint' if _is_checkpoint(config.model) else 'adapter'}, which no server reads",
            fix="write it as a model folder with `longspan export`",
        )
    told = config.rope is not None or config.rope_theta is not None
    rope: Mapping[str, Any] | None = None
    if config.serve == "llama.cpp" and told and config.rope is None:
        rope = {"rope_theta": config.rope_theta}  # the rest is the file's, which has no config.json
    elif told:
        rope = rope_settings(config.model, config.rope, config.rope_theta)
    with served(config, tokenizer, rope) as answerer:
        yield answerer


def replicas_of(options: AnswererConfig) -> int:
    """Return the copies of the model that are asked for, or that the processes which were started are enough for."""
    from longspan.core.launched import launched

    if options.replicas is not None:
        return options.replicas
    started = launched()
    if started is None or options.tp > 1 or options.is_remote:
        return 1
    return max(1, started.world // options.cp)


def find_weights(config: AnswererConfig) -> tuple[AnswererConfig, Load | None]:
    """Return the settings with the folder that is meant, and what loads it if that is a checkpoint."""
    from longspan.core.errors import ArgumentError

    quiet_transformers()
    path = find_folder(config.model)
    found = config.model_copy(update={"model": path})
    if not _is_checkpoint(path):
        return found, None
    if config.rope is not None or config.rope_theta is not None:
        raise ArgumentError(
            f"{path} is a checkpoint, which is asked with the RoPE that it was trained with",
            fix="write it as a model folder with `longspan export`, and change that",
        )
    return found, load_checkpoint


def find_folder(model: str) -> str:
    """Return the folder or hub name that is meant: of a run folder, its last stage.

    Raises:
        DataError: the last stage is not done.
    """
    path = Path(model)
    if not (path / "stages").is_dir():
        return model
    from longspan.core.errors import DataError
    from longspan.train.config import TrainConfig

    last = path / "stages" / TrainConfig.from_yaml(path / "config.yaml").stages[-1].name
    if not last.is_dir():
        raise DataError(
            f"the last stage of {path}, {last.name}, is not done",
            fix="finish the run, or name one of its stages/ or checkpoints/",
        )
    return str(last)


def load_checkpoint(config: AnswererConfig) -> PreTrainedModel:
    """Load a checkpoint of a training, which says itself how its model was made."""
    from longspan.train.trained import load_trained

    return load_trained(config.model, dtype=config.dtype).model


def _is_checkpoint(path: str) -> bool:
    return (Path(path) / "state.json").is_file()


def find_tokenizer(options: AnswererConfig) -> Tokenizer:
    """Return the tokenizer that is named, or that of the model's folder, or of an adapter's base.

    Raises:
        DataError: there is none.
    """
    from longspan.core.errors import ArgumentError, DataError
    from longspan.core.log import log_once
    from longspan.data.tokenizer import load_tokenizer

    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    if options.is_remote:
        raise ArgumentError(
            "a model behind a server has no tokenizer here",
            fix="name with --tokenizer one that counts its tokens, such as the hub name of the model",
        )
    if not options.model:
        raise ArgumentError("no model is named", found=repr(options.model), allowed=_model_kinds())
    path = Path(find_folder(options.model))
    if options.serve == "llama.cpp" and path.is_file():
        path = path.parent  # `longspan export` writes the file into the folder of its tokenizer
    if path.is_file():
        raise ArgumentError(
            f"{path} is a file, not a model", allowed=_model_kinds(), fix="name the folder that it lies in"
        )
    if ":" in options.model and not path.exists():
        raise ArgumentError("there is no such model", found=repr(options.model), allowed=_model_kinds())
    if _is_checkpoint(str(path)):
        from longspan.train.config import TrainConfig
        from longspan.train.stage_model import tokenizer_source

        config = TrainConfig.from_yaml(path.resolve().parent.parent / "config.yaml")
        found = tokenizer_source(config, Path(config.data_root))
        if found is None:
            raise DataError(f"the training of {path} names no tokenizer", fix="name it with --tokenizer")
        return load_tokenizer(found)
    from longspan.models.places import has_tokenizer, tokenizer_home

    home = tokenizer_home(path if path.is_dir() else options.model)
    if home != str(path):
        log_once("models", f"{path} has no tokenizer: that of its base {home} is used")
    if Path(home).is_dir() and not has_tokenizer(Path(home)):
        raise DataError(f"{home} has no tokenizer.json", fix="name the tokenizer with --tokenizer")
    return load_tokenizer(home)


def label_of(options: AnswererConfig) -> str:
    """Return the name of the model in reports.

    Raises:
        ArgumentError: it cannot be part of a file name.
    """
    from longspan.core.errors import ArgumentError

    name = options.model.partition(":")[2] if options.is_remote else options.model
    if not name:
        raise ArgumentError("no model is named", found=repr(options.model), allowed=_model_kinds())
    label = options.label or Path(name).absolute().name.removesuffix(".gguf")
    if options.kv_dtype is not None:
        label += (
            f"-kv-{options.kv_dtype}"  # what a smaller cache loses is not to be mixed with what the model can
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
        raise ArgumentError(
            "a label is part of a file name",
            found=repr(label),
            allowed="A-Z, a-z, 0-9 and ._-",
            fix="give one with --label",
        )
    return label


def _model_kinds() -> tuple[str, ...]:
    from longspan.api.providers import MODEL_NAMES

    return ("a folder", "a hub name", *MODEL_NAMES)


def quiet_transformers() -> None:
    """Keep transformers' bars for loading and saving off stderr; they show nothing that takes time here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
