"""Building, loading, running and saving causal language models of transformers with longspan's attention.

RoPE is part of the config before a model exists, and is written to the saved `config.json`; a saved folder
is a plain Hugging Face folder that loads without longspan.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.files import atomic_dir
from longspan.core.log import get_logger, log_once
from longspan.kernels.rope import inv_freq_hash
from longspan.models.attention import ATTENTION_NAME, register
from longspan.models.documents import Documents
from longspan.models.families import (
    check_family,
    check_layers,
    check_registry,
    hand_documents_on,
    language_model,
    reading_quantized,
)
from longspan.models.head import backbone
from longspan.models.hf_config import (
    changed_config,
    head_counts,
    new_config,
    rope_by_layer_type,
    rope_meaning,
    rope_of_full,
    text_config,
)
from longspan.models.init import INITS, seeded
from longspan.models.known_checkpoints import with_known_rope
from longspan.models.mixers import mix_documents, mixers
from longspan.models.places import adapter_base, adapter_folder
from longspan.models.rotary import depends_on_length, hold_frequencies
from longspan.models.sharding import attach_schedule
from longspan.models.side_files import complete_folder
from longspan.parallel.mesh import Mesh
from longspan.parallel.schedules import ScheduleName
from longspan.parallel.sharded_documents import ShardedDocuments

__all__ = [
    "Documents",
    "build_model",
    "empty_model",
    "enable",
    "evaluated_dtype",
    "hidden_states",
    "load_base",
    "load_model",
    "own_config",
    "reading_folder",
    "rope_fingerprint",
    "rope_of",
    "rope_settings",
    "save_model",
    "usable_device",
    "without_bars",
]


def enable(
    model: PreTrainedModel,
    *,
    schedule: ScheduleName | None = None,
    mesh: Mesh | None = None,
    context: int | None = None,
) -> PreTrainedModel:
    """Give a transformers model longspan's attention, in place, and return it.

    From then on the forward pass takes the keyword `documents`; nothing else about the model changes.

    Args:
        model: a causal language model.
        schedule: context-parallel schedule by which `shard_batch` spreads rows for it; needs `mesh`.
        mesh: from `build_mesh`.
        context: of a model whose RoPE depends on the length (LongRoPE, dynamic NTK): the length whose frequencies it
            has from here on, for every document and batch. To be called when the model is where it runs. None: those
            of the longest document of each batch, as transformers has it, which no schedule can spread.

    Raises:
        ArgumentError: a model whose attention cannot be replaced through the transformers registry, or one with
            layers that are not attention: their state would run from each document into the next.
    """
    register()
    check_registry(type(model))
    check_layers(model)
    if (schedule is None) != (mesh is None):
        raise ArgumentError(
            "a schedule needs a mesh and a mesh a schedule", found=f"schedule={schedule}, mesh={mesh}"
        )
    if schedule is not None and mesh is not None:
        num_heads, num_kv_heads = head_counts(model.config)
        attach_schedule(model, schedule, mesh, num_heads=num_heads, num_kv_heads=num_kv_heads)
    model.set_attn_implementation(ATTENTION_NAME)
    hand_documents_on(model)
    mix_documents(model)
    if context is not None:
        hold_frequencies(model, context)
    return model


def build_model(
    hf_config: Mapping[str, Any],
    *,
    seed: int,
    rope: Mapping[str, Any] | None = None,
    max_position_embeddings: int | None = None,
    init: str = "default",
) -> PreTrainedModel:
    """Build a causal language model with new weights from a config dictionary.

    Args:
        hf_config: `model_type` and the fields of that transformers config.
        seed: the weights are a pure function of it and the config; the global generator is left alone.
        rope: `kernels.rope` settings that replace those of the config; `rope_theta` may be left out.
        max_position_embeddings: as for `load_model`.
        init: "default" (the model's own) or "zero_residual" (`models.init`).

    Raises:
        ConfigError: unknown `model_type`, field, RoPE setting or init.
    """
    register()
    if init not in INITS:
        raise ConfigError("unknown init", found=init, allowed=sorted(INITS))
    config = new_config(hf_config, rope, max_position_embeddings)
    with seeded(seed, "model"):
        model = _construct(config)
    fill = INITS[init]
    if fill is not None:
        fill(model, seed=seed)
    return enable(model)


def empty_model(
    origin: Mapping[str, Any] | str | Path,
    *,
    rope: Mapping[str, Any] | None = None,
    max_position_embeddings: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Return a model on the meta device: modules and shapes without values; nothing is read but its config.

    `origin` is a config dictionary as for `build_model`, or a folder or hub name as for `load_model`; the rest is as
    for them.

    Raises:
        ConfigError, DataError: what building or loading it would raise for its config.
    """
    register()
    if isinstance(origin, Mapping):
        config = new_config(origin, rope, max_position_embeddings)
    else:
        if config is None:
            config = own_config(origin, as_saved=rope is not None)
        config = changed_config(config, rope=rope, context=max_position_embeddings, overrides=overrides)
    with torch.device("meta"):
        return enable(_construct(text_config(config)))


def own_config(path: str | Path, *, base: str | None = None, as_saved: bool = False) -> PretrainedConfig:
    """Return the config of a model in a folder or by hub name; of an adapter without one, that of its base.

    Where weights are known to work with another RoPE than their config says (`models.known_checkpoints`), that takes
    its place, with a message, unless it is wanted `as_saved`. `base` replaces the one that the adapter names.

    Raises:
        DataError: nothing says how the model is made.
    """
    adapter = adapter_folder(path)
    if adapter is not None and not (adapter / "config.json").is_file():
        config = own_config(base or adapter_base(adapter), as_saved=as_saved)
    else:
        with reading_folder(path):
            config = AutoConfig.from_pretrained(path if adapter is None else adapter)
    return config if as_saved else with_known_rope(config, path)


def rope_settings(
    path: str | Path, rope: Mapping[str, Any] | None, theta: float | None, *, base: str | None = None
) -> Mapping[str, Any] | None:
    """Return the RoPE to load a model with; None = its own. A theta alone changes nothing else of that.

    Raises:
        ArgumentError: theta is given twice.
        DataError: nothing at `path` says which RoPE the model has.
    """
    if theta is None:
        return rope
    if rope is not None:
        if "rope_theta" in rope:
            raise ArgumentError("the base of the RoPE is given twice", fix="leave out one of them")
        return {**rope, "rope_theta": theta}
    own = rope_of(own_config(path, base=base))
    return {**(own or {}), "rope_theta": theta}


def load_model(
    path: str | Path,
    *,
    rope: Mapping[str, Any] | None = None,
    max_position_embeddings: int | None = None,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, Any] | None = None,
    tp: int = 1,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a causal language model from a Hugging Face folder or hub name, with longspan's attention.

    An adapter (`models.lora`) is loaded with the base model that it names.

    Args:
        path: folder or hub name.
        rope: `kernels.rope` settings that replace those of the config; `rope_theta` may be left out.
        max_position_embeddings: replaces the config's where that is smaller; not of dynamic NTK, which works by it.
        dtype: dtype of the weights; None = as saved.
        overrides: other fields of the config that replace those of the folder.
        tp: ranks that share each matrix by the model's own plan, for inference: all ranks of the run, each of
            which calls this. Each holds the whole output embedding.
        config: what `own_config` has read already; not of an adapter.

    Raises:
        ArgumentError: heads that do not divide among the `tp` ranks, or an adapter with `tp`.
        DataError: nothing loadable at `path`, or weights that do not fill the model.
        ConfigError: an unknown RoPE setting.
    """
    if adapter_folder(path) is not None:
        # That room is built on this one.
        from longspan.models.lora import load_adapter

        if overrides:
            raise ArgumentError(f"{path} is an adapter: the fields of its config are those of its base")
        if tp > 1:
            raise ArgumentError(
                f"{path} is an adapter, whose matrices are not shared between processes",
                fix="merge it with `longspan export` first",
            )
        return load_adapter(path, rope=rope, max_position_embeddings=max_position_embeddings, dtype=dtype)
    return load_base(
        path,
        rope=rope,
        max_position_embeddings=max_position_embeddings,
        dtype=dtype,
        overrides=overrides,
        tp=tp,
        config=config,
    )


def load_base(
    path: str | Path,
    *,
    rope: Mapping[str, Any] | None = None,
    max_position_embeddings: int | None = None,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, Any] | None = None,
    tp: int = 1,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a model as `load_model` does, but no adapter; `config` takes the place of the folder's."""
    register()
    if config is None:
        config = own_config(path, as_saved=rope is not None)
    config = changed_config(config, rope=rope, context=max_position_embeddings, overrides=overrides)
    check_family(config)
    sharing = {"distributed_config": _tensor_parallel(config, tp)} if tp > 1 else {}
    bars = without_bars() if Path(path).exists() else contextlib.nullcontext()
    with reading_folder(path), reading_quantized(config, path), bars:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            attn_implementation=ATTENTION_NAME,
            dtype="auto" if dtype is None else dtype,
            # Mismatches come back in the report instead of as a RuntimeError without names.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **sharing,
        )
    # transformers fills what it does not find with random numbers.
    absent = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if absent:
        raise DataError(
            f"the weights in {path} are not those of its config.json",
            found=f"{len(absent)} parameters missing or of another shape: {', '.join(absent[:4])}",
            fix="restore the folder from where it came",
        )
    if tp > 1:
        _gather_head(model)
    return enable(language_model(model, path))


def _tensor_parallel(config: PretrainedConfig, ranks: int) -> DistributedConfig:
    heads, kv_heads = head_counts(config)
    if heads % ranks or kv_heads % ranks:
        raise ArgumentError(
            f"the heads of this model do not divide among {ranks} processes",
            found=f"{heads} heads, {kv_heads} of keys",
            fix="share sequences instead (--cp), or use fewer processes",
        )
    return DistributedConfig(tp_size=ranks)


def _gather_head(model: PreTrainedModel) -> None:
    """Give every rank the whole output embedding: losses are computed by it a chunk of tokens at a time."""
    head = model.get_output_embeddings()
    if isinstance(head.weight, DTensor):
        head.weight = torch.nn.Parameter(head.weight.full_tensor(), requires_grad=False)
        # What transformers put in its place shares the logits out.
        vars(head).pop("forward", None)


def usable_device() -> torch.device:
    """Return CUDA where torch can use it, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluated_dtype(path: str | Path, device: torch.device, asked: str | None = None) -> torch.dtype | None:
    """Return the type to load the weights at `path` in when they are to be asked on `device`; None = as saved.

    Training saves 32 bits, the flash kernels of CUDA take 16: there it is bfloat16 unless another type is asked for.
    """
    if asked is not None:
        return getattr(torch, asked)
    narrow = (torch.bfloat16, torch.float16)
    if device.type != "cuda" or own_config(path, as_saved=True).dtype in narrow:
        return None
    say_narrowed(path)
    return torch.bfloat16


def say_narrowed(path: str | Path) -> None:
    """Say once that weights are computed with in a narrower type than they are saved in."""
    log_once(
        "models",
        f"{path}: computed in bfloat16, as trained on a GPU; another type (--dtype float32) takes dense attention, "
        "many times slower",
    )


def save_model(
    model: PreTrainedModel, path: str | Path, *, tokenizer: str | Path | None = None, replace: bool = False
) -> None:
    """Write a Hugging Face folder that plain transformers loads; it appears whole or not at all.

    `tokenizer` is a folder whose tokenizer files come along.

    Raises:
        ArgumentError: `path` exists and `replace` is false.
        RunError: the disk refuses the bytes.
    """
    if Path(path).exists() and not replace:
        raise ArgumentError(f"{path} already exists", fix="choose another path or remove it")
    with atomic_dir(path, replace=replace) as folder, without_bars():
        model.save_pretrained(folder)
        for note in complete_folder(folder, tokenizer=tokenizer):
            get_logger("models").info("%s: %s", path, note)


@contextlib.contextmanager
def reading_folder(path: str | Path) -> Iterator[None]:
    """Turn what reading a model folder or hub name raises into a DataError."""
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise DataError(f"{path} is not a Hugging Face model folder", found="no config.json")
    try:
        yield
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise DataError(
            f"cannot load a model from {path}",
            found=" ".join(line.strip() for line in str(error).strip().splitlines()[:2]),
            fix="give a folder with config.json and safetensors weights, or a hub name that can be downloaded",
        ) from error


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every local folder it reads or writes."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def rope_fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hex characters for the RoPE that a built model really uses, from its frequency buffers.

    "none" of a model that has none: a hybrid, or learnt positions (GPT-2).

    Raises:
        ArgumentError: the frequencies are not found, or still on the meta device.
    """
    parts = []
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if not key.endswith("inv_freq") or key.endswith("original_inv_freq"):
                continue
            if buffer.is_meta:
                raise ArgumentError(
                    "the rotary frequencies are not computed yet", found=f"{name}.{key} on meta"
                )
            # Types that change their frequencies with the input keep the first ones beside them.
            first = getattr(module, key.replace("inv_freq", "original_inv_freq"), buffer)
            scaling = float(getattr(module, "attention_scaling", 1.0))
            parts.append(f"{key}={inv_freq_hash(first, attention_scaling=scaling)}")
    if not parts:
        if any(mixers(model)) or rope_of(model.config) is None:
            # Layers with a state, and learnt positions, tell positions apart by themselves.
            return "none"
        raise ArgumentError(f"{type(model).__name__} has no rotary frequencies")
    settings = text_config(model.config).rope_parameters or {}
    if any(depends_on_length(found.get("rope_type")) for found in rope_by_layer_type(settings).values()):
        context = getattr(text_config(model.config), "max_position_embeddings", None)
        parts.append(json.dumps(rope_meaning(settings, context), sort_keys=True))
    return hashlib.sha256("\n".join(sorted(set(parts))).encode()).hexdigest()[:16]


def rope_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the RoPE settings of a config, those of full attention where a model has several; None without RoPE."""
    parameters = getattr(text_config(config), "rope_parameters", None)
    return rope_of_full(parameters) if parameters else None


def hidden_states(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    documents: Documents | ShardedDocuments | None = None,
    *,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the last hidden states, the input of the output embedding.

    Args:
        model: a model with longspan's attention.
        input_ids: int64 [tokens] or [batch, tokens].
        documents: document table of all tokens; None = each row is one document.
        position_ids: same shape as `input_ids`; None = counted from the start of each document.

    Returns:
        [tokens, hidden] or [batch, tokens, hidden], in the shape of `input_ids`.

    Raises:
        ArgumentError: a model that gives logits only, or whose attention longspan's cannot replace.
    """
    ids = input_ids if input_ids.ndim == 2 else input_ids[None]
    if position_ids is None:
        if documents is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        else:
            position_ids = documents.positions(ids.device)
    output = backbone(model)(
        input_ids=ids, position_ids=position_ids.reshape(ids.shape), documents=documents, use_cache=False
    )
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise ArgumentError(f"{type(model).__name__} does not give its hidden states apart from its logits")
    return states.reshape(*input_ids.shape, -1)


def _construct(config: PretrainedConfig) -> PreTrainedModel:
    check_family(config)
    try:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=ATTENTION_NAME)
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"transformers makes no causal language model of a {config.model_type} config",
            found=str(error).strip().splitlines()[0][:200],
        ) from error
