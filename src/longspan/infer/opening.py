"""From the name of a model to something that answers: a folder, a loaded model, or a server.

    model, a hub name       a folder in Hugging Face's form, or what the hub calls it
    run/stages/long         the same: a stage's folder, or an adapter's with the base that it names
    openai:NAME             a server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp do), as a chat
    completions:NAME        the same, for plain text that is continued
    anthropic:NAME          Anthropic's

What other readers open (a checkpoint of a training) is given as a function that loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from longspan.api import ServerConfig, remote_model
from longspan.api.providers import MODEL_NAMES
from longspan.core.errors import ArgumentError
from longspan.core.log import get_logger
from longspan.core.schedule_table import ScheduleName
from longspan.data.tokenizer import Tokenizer
from longspan.infer.context_parallel import SpreadModel
from longspan.infer.distributed import TIMEOUT_SECONDS, Member, is_first_rank, join_ranks
from longspan.infer.local import LocalAnswerer
from longspan.infer.memory import available_memory, shared_memory
from longspan.infer.perplexity import token_nll
from longspan.infer.plain import PlainAnswerer, refuse_unknown_ids, refuse_unknown_tokens
from longspan.infer.remote import open_remote
from longspan.infer.replicas import Replica
from longspan.infer.requests import Answer, Answerer, Request, Watched
from longspan.models.hf import evaluated_dtype, load_model, rope_settings, say_narrowed, usable_device
from longspan.models.identity import model_identity
from longspan.parallel.mesh import MeshConfig, build_mesh

BATCH_TOKENS = 16_384


class ModelSource(NamedTuple):
    """Where a model's weights come from and what is changed about it; can be sent to another process."""

    path: str
    """Folder or hub name; what records call the model."""
    rope: Mapping[str, Any] | None = None
    """RoPE settings in place of the config's."""
    rope_theta: float | None = None
    """Base of the frequencies in place of the config's, whatever else its RoPE is."""
    dtype: str | None = None
    """Type of the weights, `bfloat16` say; None = as saved, but bfloat16 on CUDA if that is wider."""
    load: Callable[[ModelSource], PreTrainedModel] | None = None
    """Loads it in place of `models.hf.load_model`, in `dtype`: a function of a module, so that it can be sent."""


def load_source(source: ModelSource, *, device: torch.device | None = None, tp: int = 1) -> PreTrainedModel:
    """Load a model and put it on the device (None: the usable one), ready to be run.

    With `tp` ranks, all of which call this, each gets its share of every matrix.
    """
    device = usable_device() if device is None else device
    if (load := source.load) is not None:
        if tp > 1:
            raise ArgumentError(f"{source.path} cannot be shared by --tp", fix="export it first, or use --cp")
        if source.dtype is None and device.type == "cuda":
            say_narrowed(source.path)
            source = source._replace(dtype="bfloat16")
        model = load(source)
    else:
        dtype = evaluated_dtype(source.path, device, source.dtype)
        rope = rope_settings(source.path, source.rope, source.rope_theta)
        model = load_model(source.path, rope=rope, dtype=dtype, tp=tp)
    if tp == 1:
        model = model.to(device)
    return model.eval()


def identify(model: PreTrainedModel, source: ModelSource) -> dict[str, Any]:
    """Return what the header of records says of a loaded model: the same for any number of processes."""
    return {
        **model_identity(model, source.path),
        "trained_length": model.config.get_text_config(decoder=True).max_position_embeddings,
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": "transformers",
    }


def open_answerer(
    model: str | ModelSource,
    *,
    tokenizer: Tokenizer | None = None,
    rope: Mapping[str, Any] | None = None,
    rope_theta: float | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    tp: int = 1,
    cp: int = 1,
    replicas: int = 1,
    schedule: ScheduleName | None = None,
    prefix_reuse: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    base_url: str | None = None,
    server: ServerConfig | None = None,
) -> Answerer:
    """Open a model; close what is returned. Of one that is run here that is a `GivesLosses`, too.

    With several processes this returns in the first: it starts the others on this machine, or they are those of
    torchrun or srun, where they end in this call with SystemExit when the model is closed.

    Args:
        model: see the module; a `ModelSource` says all about the weights itself.
        tokenizer: decodes answers; needed for models that are run here.
        rope, rope_theta, dtype: see `ModelSource`.
        max_length: tokens that prompt and answer may have together; None = the model's own limit is not asked.
        tp: processes that share each matrix.
        cp: processes that share each sequence, by `schedule` (None: ring).
        replicas: copies of the model that share out what is asked, each on one process or on `cp`.
        prefix_reuse: read a prefix that several prompts share once.
        batch_tokens: tokens in one forward pass, at least one sequence.
        base_url: of the server; None = the provider itself.
        server: how it is asked.

    Raises:
        DataError, ConfigError: the model cannot be loaded so.
        ArgumentError: settings that do not go together.
        RunError: another process failed.
    """
    if isinstance(model, str) and remote_model(model) is not None:
        if tp > 1 or cp > 1 or replicas > 1:
            raise ArgumentError(
                "how a model runs behind a server is decided there", found="--tp, --cp or --replicas"
            )
        given = {"base_url": base_url, "max_length": max_length}
        how = (server or ServerConfig()).model_copy(update={k: v for k, v in given.items() if v is not None})
        return open_remote(model, how, tokenizer=tokenizer)
    if base_url is not None or server is not None:
        raise ArgumentError(
            "an address is for models behind a server",
            found=model if isinstance(model, str) else model.path,
            allowed=MODEL_NAMES,
        )
    if tokenizer is None:
        raise ArgumentError("a model that is run here needs its tokenizer")
    source = model if isinstance(model, ModelSource) else ModelSource(model, rope, rope_theta, dtype)
    settings = _Settings(
        source, tokenizer, max_length, tp, cp, schedule or "ring", prefix_reuse, batch_tokens, replicas
    )
    _check_sharing(tp, cp, replicas)
    if tp == cp == replicas == 1:
        return _build(usable_device(), settings)
    return join_ranks(replicas * tp * cp, _build, settings)


def _check_sharing(tp: int, cp: int, replicas: int) -> None:
    """Refuse ways to share a model that do not go together."""
    if tp > 1 and cp > 1:
        raise ArgumentError(
            "processes share either matrices or sequences", found=f"--tp {tp} --cp {cp}", fix="leave out one"
        )
    if tp > 1 and replicas > 1:
        raise ArgumentError(
            "matrices are shared by all processes", found=f"--tp {tp} --replicas {replicas}",
            fix="let each replica run on one process, or on several with --cp",
        )  # fmt: skip


class _Settings(NamedTuple):
    """What every rank has to know to make its part of a model."""

    source: ModelSource
    tokenizer: Tokenizer
    max_length: int | None
    tp: int
    cp: int
    schedule: ScheduleName
    prefix_reuse: bool
    batch_tokens: int
    replicas: int = 1


def _build(device: torch.device, settings: _Settings) -> Member:
    """Make this rank's part of a model; all ranks call it together."""
    member = _build_member(device, settings)
    return member if settings.replicas == 1 else Replica(member, copies=settings.replicas)


def _build_member(device: torch.device, settings: _Settings) -> Member:
    """Make this rank's part of its copy of a model."""
    mesh = (
        build_mesh(
            MeshConfig.of_schedule(settings.schedule, settings.cp, dp_replicate=settings.replicas),
            device,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        if settings.cp > 1
        else None
    )
    model = load_source(settings.source, device=device, tp=settings.tp)
    shared: dict[str, Any] = {
        # Reading all weights for their hash takes its time: only the first rank is asked who it is.
        "identity": identify(model, settings.source) if is_first_rank() else {},
        "max_length": settings.max_length,
        "batch_tokens": settings.batch_tokens,
    }
    if mesh is not None:
        return SpreadModel(
            model,
            settings.tokenizer,
            mesh=mesh,
            schedule=settings.schedule,
            prefix_reuse=settings.prefix_reuse,
            **shared,
        )
    return ModelHere(
        model,
        settings.tokenizer,
        prefix_reuse=settings.prefix_reuse,
        # Ranks that heard different numbers would read different batches, and wait for each other.
        available=shared_memory if settings.tp > 1 else partial(_available, settings.replicas),
        **shared,
    )


def _available(replicas: int, device: torch.device) -> int | None:
    """Return the bytes that one of several replicas can have: on the CPU they share those of their machine."""
    free = available_memory(device)
    return free if free is None or device.type != "cpu" else free // replicas


class ModelHere:
    """A model in this process: what is asked in requests goes to an answerer, losses are computed by themselves.

    Args:
        model: with longspan's attention.
        prefix_reuse: read a prefix that several prompts share once.

    Other arguments are those of `LocalAnswerer`, and of `PlainAnswerer` as far as that has them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        identity: Mapping[str, Any],
        max_length: int | None,
        prefix_reuse: bool,
        batch_tokens: int,
        available: Callable[[torch.device], int | None] = available_memory,
    ) -> None:
        self.identity, self.max_length = identity, max_length
        shared: dict[str, Any] = {
            "identity": identity,
            "max_length": max_length,
            "batch_tokens": batch_tokens,
        }
        self.answerer: LocalAnswerer | PlainAnswerer
        if prefix_reuse:
            self.answerer = LocalAnswerer(model, tokenizer, available=available, **shared)
        else:
            self.answerer = PlainAnswerer(model, tokenizer, **shared)
        self._model, self._batch_tokens = model, batch_tokens
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        if 2 * tokenizer.vocab_size < self._vocabulary:
            # Ids of a smaller vocabulary are all known to the model, and mean other words.
            get_logger("infer").warning(
                "the tokenizer has %d tokens and the model %d: is it the model's own?",
                tokenizer.vocab_size, self._vocabulary,
            )  # fmt: skip

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Continue each prompt greedily; see `Answerer`."""
        refuse_unknown_tokens(requests, self._vocabulary)
        return self.answerer.generate(requests)

    def generate_stream(self, request: Request, on_text: Callable[[str], None]) -> Answer:
        """Continue a prompt greedily; `on_text` is given the answer piece by piece as it comes."""
        refuse_unknown_tokens([request], self._vocabulary)
        return self.answerer.generate_stream(request, on_text)

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Measure each given answer after its prompt; see `Answerer`."""
        refuse_unknown_tokens(requests, self._vocabulary)
        return self.answerer.score(requests)

    def watch(self, on_share: Callable[[float], None] | None) -> bool:
        """Report progress: the share of a call's work that is done; see `infer.requests.Watched`."""
        return isinstance(self.answerer, Watched) and self.answerer.watch(on_share)

    def token_nll(self, windows: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Return the losses of windows; see `infer.perplexity.token_nll`."""
        refuse_unknown_ids(windows, self._vocabulary)
        return token_nll(self._model, windows, batch_tokens=self._batch_tokens)

    def close(self) -> None:
        """Do nothing: the model belongs to the caller."""
        self.answerer.close()
