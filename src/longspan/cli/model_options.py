"""Options of all commands that ask a model, and what becomes of them.

    @app.command()
    @takes_model
    def needle(model: ModelOptions, prompts: PromptOptions, data: Data, ...) -> None:
        with opened(model, prompts) as asked:
            asked.answerer.generate(...)

`takes_model` puts the options below in place of the arguments `model` and `prompts`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_type_hints

import typer

from longspan.cli.counts import count_option

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from longspan.data.tokenizer import Tokenizer
    from longspan.eval.prompts import PromptForm
    from longspan.infer.opening import ModelSource, ServerConfig
    from longspan.infer.requests import Answerer

MODEL_KINDS = ("a folder", "a hub name", "openai:NAME", "completions:NAME", "anthropic:NAME")
Schedule = Literal["ring", "striped", "dist_flash", "ulysses", "usp", "all_gather"]
DType = Literal["float32", "bfloat16", "float16"]


class ModelOptions(NamedTuple):
    """What the command line says of a model."""

    model: Annotated[
        str,
        typer.Option(
            help="Hugging Face folder or hub name, a folder of our training (run, stage, checkpoint, adapter), or "
            "openai:NAME, completions:NAME, anthropic:NAME for a model behind a server.",
        ),
    ]
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer. Default: the one in the model's folder, or of an adapter's base."),
    ] = None
    label: Annotated[
        str | None, typer.Option(help="Name of the model in reports. Default: that of its folder.")
    ] = None
    rope: Annotated[
        str | None,
        typer.Option(
            help="RoPE to use instead of the model's own, such as '{rope_type: linear, factor: 8}'."
        ),
    ] = None
    rope_theta: Annotated[
        float | None, typer.Option(help="Base of the RoPE instead of the model's own, such as 5e6.")
    ] = None
    max_length: Annotated[
        str | None,
        typer.Option(help="Tokens of prompt and answer at most, such as 128k. Default: no limit."),
    ] = None
    dtype: Annotated[
        DType | None, typer.Option(help="Type of the weights. Default: as saved; on a GPU bfloat16.")
    ] = None
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Ask as in a chat: `own` for the tokenizer's template, or a shipped name or a Jinja file. "
            "Default: as plain text."
        ),
    ] = None
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallelism: processes that share each matrix.")] = 1
    cp: Annotated[
        int, typer.Option(min=1, help="Context parallelism: processes that share each sequence.")
    ] = 1
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Copies of the model, each on a process (or on --cp), that share out the samples. Default: as many as "
            "torchrun or srun has started processes for, else 1.",
        ),
    ] = None
    schedule: Annotated[
        Schedule, typer.Option(help="Context-parallel schedule: how keys travel among the --cp processes.")
    ] = "ring"
    batch_tokens: Annotated[
        int, count_option(help="Tokens in one forward pass, at least one sample.", min=1)
    ] = 16384
    no_prefix_reuse: Annotated[
        bool, typer.Option("--no-prefix-reuse", help="Read every prompt from its first token.")
    ] = False
    base_url: Annotated[
        str | None, typer.Option(help="Address of the server, such as http://localhost:8000/v1.")
    ] = None
    server: Annotated[
        str | None,
        typer.Option(
            help="How the server is asked, as YAML or a YAML file: trained_length, limits (concurrency, "
            "tokens_per_minute ...), budget, cache, extra, continue_final_message, key_variable, api_version."
        ),
    ] = None

    @property
    def is_remote(self) -> bool:
        """Whether the model is behind a server."""
        return self.model.startswith(("openai:", "completions:", "anthropic:"))

    @property
    def is_chat_server(self) -> bool:
        """Whether that server puts every prompt into a chat."""
        return self.model.startswith(("openai:", "anthropic:"))


class PromptOptions(NamedTuple):
    """What the command line says of prompts, and of the answers to them."""

    bos: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(
            help="Whether prompts begin with BOS. auto: as the tokenizer itself would have it. What a chat template "
            "writes stays."
        ),
    ] = "auto"
    thinking: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(
            help="Whether a chat's model thinks before it answers. auto: as its template has it. Thoughts are never "
            "scored."
        ),
    ] = "auto"
    template_args: Annotated[
        str | None,
        typer.Option(
            help="Variables of the chat template as YAML, such as '{enable_thinking: false}'; a chat server is sent "
            "them as chat_template_kwargs."
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a generated answer, thoughts included. Default: what the task says, and 4,096 more for a "
            "model that thinks.",
        ),
    ] = None


class AskedModel(NamedTuple):
    """A model that was opened for a command."""

    answerer: Answerer
    tokenizer: Tokenizer
    label: str
    """Name in reports, part of file names."""

    def records(self, out: Path, task: str) -> Path:
        """Return the file that the records of a task go to."""
        return out / "records" / f"{task}-{self.label}.jsonl"


def takes_model(command: Callable[..., None], *, as_argument: bool = False) -> Callable[..., None]:
    """Give a command the options of `ModelOptions` and `PromptOptions` in place of `model` and `prompts`.

    `as_argument`: the model itself is the command's argument, not an option, and it is asked one thing, so that
    there is nothing for replicas.
    """
    own = inspect.signature(command, eval_str=True).parameters
    bundles: dict[str, Any] = {
        name: kind for name, kind in (("model", ModelOptions), ("prompts", PromptOptions)) if name in own
    }
    options = [option for kind in bundles.values() for option in _options_of(kind)]
    if as_argument:
        said = options[0].annotation.__metadata__[0].help
        options[0] = options[0].replace(annotation=Annotated[str, typer.Argument(help=said)])
        options = [option for option in options if option.name != "replicas"]
    rest = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.items()
        if name not in bundles
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        made = {
            name: kind(**{field: given.pop(field) for field in kind._fields if field in given})
            for name, kind in bundles.items()
        }
        command(**made, **given)

    del with_options.__wrapped__  # or typer would read the options of that
    # What must be given comes first, then what is the command's own.
    parameters = [options[0], *rest, *options[1:]]
    parameters.sort(key=lambda each: each.default is not inspect.Parameter.empty)
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def _options_of(kind: Any) -> list[inspect.Parameter]:
    """Return the fields of a bundle of options as parameters of a command."""
    fields = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=fields[name],
            default=kind._field_defaults.get(name, inspect.Parameter.empty),
        )
        for name in kind._fields
    ]


def form_of(options: ModelOptions, prompts: PromptOptions) -> PromptForm:
    """Return how prompts are put to the model that is named."""
    from longspan.eval.prompts import PromptForm

    server = find_server(options) if options.is_remote else None
    return PromptForm(
        find_tokenizer(options),
        bos=prompts.bos,
        chat_template=options.chat_template,
        template_args=_template_args(prompts),
        thinking=prompts.thinking,
        max_new_tokens=prompts.max_new_tokens,
        chat_server=options.is_chat_server,
        continues=server is not None and server.continue_final_message,
    )


def _template_args(prompts: PromptOptions) -> dict[str, Any]:
    from longspan.core.config import parse_yaml
    from longspan.core.errors import ArgumentError

    given = parse_yaml(prompts.template_args, where="--template-args") if prompts.template_args else {}
    if not all(isinstance(name, str) and name.isidentifier() for name in given):
        raise ArgumentError(
            "--template-args holds no variables",
            found=prompts.template_args,
            allowed="names and values, such as '{enable_thinking: false}'",
        )
    if taken := sorted({"messages", "add_generation_prompt"} & set(given)):
        raise ArgumentError("--template-args holds what longspan itself tells the template", found=taken)
    return given


def _told(options: ModelOptions, prompts: PromptOptions | None) -> ServerConfig | None:
    """Return how the server is asked, with what it has to tell its chat template."""
    from longspan.core.errors import ArgumentError
    from longspan.eval.thinking_templates import template_variables
    from longspan.infer.opening import ServerConfig

    server = find_server(options)
    if prompts is None or not options.is_chat_server:
        return server
    # The provider itself refuses fields that it does not know.
    own = options.model.startswith("openai:") and options.base_url is not None
    variables = template_variables(prompts.thinking if own else "auto", _template_args(prompts))
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
def opened(options: ModelOptions, prompts: PromptOptions | None = None) -> Iterator[AskedModel]:
    """Open the model that the options name, and close it in the end; `prompts`: how it is asked.

    With several processes this returns in the first alone: the others follow its commands and end here.
    """
    from longspan.core.units import parse_length
    from longspan.infer.opening import open_answerer

    tokenizer = find_tokenizer(options)
    label = label_of(options)
    if options.is_remote:
        _refuse_weights(options)
    answerer = open_answerer(
        options.model if options.is_remote else find_source(options),
        tokenizer=tokenizer,
        max_length=None if options.max_length is None else parse_length(options.max_length),
        tp=options.tp,
        cp=options.cp,
        replicas=replicas_of(options),
        schedule=options.schedule if options.cp > 1 else None,
        prefix_reuse=not options.no_prefix_reuse,
        batch_tokens=options.batch_tokens,
        base_url=options.base_url,
        server=_told(options, prompts),
    )
    try:
        yield AskedModel(answerer, tokenizer, label)
    finally:
        answerer.close()


def replicas_of(options: ModelOptions) -> int:
    """Return the copies of the model that are asked for, or that the processes which were started are enough for."""
    from longspan.core.launched import launched

    if options.replicas is not None:
        return options.replicas
    started = launched()
    if started is None or options.tp > 1 or options.is_remote:
        return 1
    return max(1, started.world // options.cp)


def _refuse_weights(options: ModelOptions) -> None:
    """Raise ArgumentError for what changes weights that are not here."""
    from longspan.core.errors import ArgumentError

    given = {"--rope": options.rope, "--rope-theta": options.rope_theta, "--dtype": options.dtype}
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise ArgumentError("how a model runs behind a server is decided there", found=" ".join(named))


def find_source(options: ModelOptions) -> ModelSource:
    """Return where the weights come from, and what is changed about the model."""
    from longspan.cli.output import quiet_transformers
    from longspan.core.config import parse_yaml
    from longspan.core.errors import ArgumentError
    from longspan.infer.opening import ModelSource

    quiet_transformers()
    path = find_folder(options.model)
    rope = parse_yaml(options.rope, where="--rope") if options.rope else None
    if not _is_checkpoint(path):
        return ModelSource(path, rope, options.rope_theta, options.dtype)
    if rope is not None or options.rope_theta is not None:
        raise ArgumentError(
            f"{path} is a checkpoint, which is asked with the RoPE that it was trained with",
            fix="write it as a model folder with `longspan export`, and change that",
        )
    return ModelSource(path, dtype=options.dtype, load=load_checkpoint)


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


def load_checkpoint(source: ModelSource) -> PreTrainedModel:
    """Load a checkpoint of a training, which says itself how its model was made."""
    from longspan.train.trained import load_trained

    return load_trained(source.path, dtype=source.dtype).model


def _is_checkpoint(path: str) -> bool:
    return (Path(path) / "state.json").is_file()


def find_tokenizer(options: ModelOptions) -> Tokenizer:
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
        raise ArgumentError("no model is named", found=repr(options.model), allowed=MODEL_KINDS)
    path = Path(find_folder(options.model))
    if path.is_file():
        raise ArgumentError(
            f"{path} is a file, not a model", allowed=MODEL_KINDS, fix="name the folder that it lies in"
        )
    if ":" in options.model and not path.exists():
        raise ArgumentError("there is no such model", found=repr(options.model), allowed=MODEL_KINDS)
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


def find_server(options: ModelOptions) -> ServerConfig | None:
    """Return how the server is asked; None: nothing is said of it."""
    if options.server is None:
        return None
    from longspan.core.config import parse_yaml
    from longspan.infer.opening import ServerConfig

    if Path(options.server).is_file():
        return ServerConfig.from_yaml(options.server)
    return ServerConfig.from_dict(parse_yaml(options.server, where="--server"), where="--server")


def label_of(options: ModelOptions) -> str:
    """Return the name of the model in reports.

    Raises:
        ArgumentError: it cannot be part of a file name.
    """
    from longspan.core.errors import ArgumentError

    name = options.model.partition(":")[2] if options.is_remote else options.model
    if not name:
        raise ArgumentError("no model is named", found=repr(options.model), allowed=MODEL_KINDS)
    label = options.label or Path(name).absolute().name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
        raise ArgumentError(
            "a label is part of a file name",
            found=repr(label),
            allowed="A-Z, a-z, 0-9 and ._-",
            fix="give one with --label",
        )
    return label
