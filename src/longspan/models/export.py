"""Hugging Face folders for others: adapters merged, older names of the settings beside the new ones, all checked.

An adapter is merged in this order: the quantised base is taken back to float32, the adapter is added to it, the sum
is rounded once to the type that is written. Merged into the 4-bit weights, it would be rounded to 4 bits again, by
more than training had changed.

The folder is written aside, checked (what transformers and vLLM need is there, and fits), then renamed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import atomic_dir, read_json, write_json
from longspan.core.seeds import derive_seed
from longspan.models.adapter_card import adapter_note
from longspan.models.families import refuse_quantized
from longspan.models.head import backbone
from longspan.models.hf import without_bars
from longspan.models.hf_config import rope_meaning
from longspan.models.lora import adapter_config, attach, detach, is_adapted, save_adapter
from longspan.models.quantize import dequantize
from longspan.models.side_files import complete_folder

__all__ = ["ExportReport", "check_folder", "export_adapter", "export_model", "merge_adapter"]

PROBE_TOKENS = 64
"""Tokens on which logits are compared before and after."""
MERGE_TOLERANCE = 1e-3
"""Largest difference of a logit, as a part of the largest logit (at least 1), that merging in float32 may make."""

DTYPES = ("float32", "bfloat16", "float16")


class ExportReport(NamedTuple):
    """What was written, and by how much its logits differ on some tokens."""

    path: Path
    kind: Literal["model", "merged", "adapter"]
    dtype: str
    """Type of the written weights."""
    parameters: int
    merge_error: float | None
    """Largest difference of a logit between base with adapter and the merged model, in float32; None = no merge."""
    rounding_error: float | None
    """Largest difference of a logit by rounding the weights to `dtype`, computed in float32; None = not rounded."""
    notes: list[str]
    """What a server of models may miss."""


def export_model(
    model: PreTrainedModel,
    out: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    generation: str | Path | None = None,
) -> ExportReport:
    """Write a model as a Hugging Face folder that loads without longspan, its adapter merged; `model` is used up.

    Args:
        model: from `models.hf.load_model`, with or without an adapter.
        out: a folder that is not there yet; it appears whole or not at all.
        dtype: type of the written weights; None = that of the model (of the base, beside an adapter).
        tokenizer: folder whose tokenizer files come along.
        generation: folder whose generation_config.json comes along, its length raised; None = the model's own.

    Memory: 4 bytes a weight where there is an adapter, else that of the model.

    Raises:
        ArgumentError: `out` exists, or an unknown dtype.
        ConfigError: a base that was stored quantised.
        DataError: what would be written is not what was trained, or would not load; a weight that is not finite in
            its type.
        RunError: the disk refuses the bytes.
    """
    if Path(out).exists():
        raise ArgumentError(f"{out} already exists", fix="choose another path or remove it")
    name = dtype or str(model.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ArgumentError("weights are not written in this type", found=name, allowed=DTYPES)
    refuse_quantized(model.config, "the model", verb="exported")
    model.eval()
    adapted, rounded = is_adapted(model), name != str(model.dtype).removeprefix("torch.")
    _check_finite(model)
    merge_error = merge_adapter(model) if adapted else None
    rounding_error = _round(model, getattr(torch, name)) if adapted or rounded else None
    overflow = _overflow(model, getattr(torch, name))
    with atomic_dir(out) as folder, without_bars():
        # transformers refuses to write settings of generation that it has read; they are copied.
        own, model.generation_config = model.generation_config, GenerationConfig()
        model.save_pretrained(folder)
        model.generation_config = own
        _write_generation(model, folder, generation)
        notes = overflow + complete_folder(folder, tokenizer=tokenizer) + check_folder(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind: Literal["model", "merged"] = "merged" if adapted else "model"
    return ExportReport(Path(out), kind, name, parameters, merge_error, rounding_error, notes)


def export_adapter(
    model: PreTrainedModel, out: str | Path, *, base: str | Path, tokenizer: str | Path | None = None
) -> ExportReport:
    """Write the adapter of a model alone, as `models.lora.save_adapter` does, and say what its users have to know.

    Raises:
        ArgumentError: no adapter, or `out` exists.
    """
    save_adapter(model, out, base=base, tokenizer=tokenizer)
    settings = adapter_config(model)
    text = model.config.get_text_config(decoder=True)
    notes = [
        adapter_note(str(base)),
        f"the base {base} has to be loaded with the settings of config.json: rope_parameters "
        f"{json.dumps(text.rope_parameters)}, max_position_embeddings {text.max_position_embeddings}",
    ]
    if settings["use_dora"] or settings["modules_to_save"] or settings["target_parameters"]:
        notes.append(
            "vLLM serves no adapter with DoRA, with layers trained whole or on experts: export it merged"
        )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ExportReport(Path(out), "adapter", "float32", trained, None, None, notes)


def merge_adapter(model: PreTrainedModel) -> float:
    """Merge the adapter of a model into its weights, in place, all in float32; return the difference that it makes.

    Returns:
        Largest difference of a logit between base with adapter and the merged model, on some tokens, in float32.

    Raises:
        DataError: weights that are not finite, or logits that differ by more than rounding explains.
    """
    config, tensors = detach(model)
    dequantize(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    handle = attach(model, config, tensors)
    model.eval()
    before = _logits(model)
    try:
        handle.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise DataError("the adapter cannot be merged", found=str(error)) from error
    if hasattr(model, "peft_config"):
        del model.peft_config
    difference = float((_logits(model) - before).abs().max())
    allowed = MERGE_TOLERANCE * max(1.0, float(before.abs().max()))
    if not difference <= allowed:
        raise DataError(
            "the merged model is not the one that was trained",
            found=f"logits differ by {difference:.2g}",
            allowed=allowed,
        )
    return difference


def check_folder(folder: str | Path) -> list[str]:
    """Check that transformers and vLLM find what they need in a model folder; return what they may miss.

    Weight files are looked at by their headers: names and shapes, not values.

    Raises:
        DataError: a setting is missing or means something else when read again, or weights do not fill the model.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    config = AutoConfig.from_pretrained(folder)
    # What others call it: GPT-2's n_positions.
    own_names = config.attribute_map
    for key in ("architectures", "model_type", "dtype", "vocab_size", "max_position_embeddings"):
        names = (key, own_names.get(key, key))
        if not any(values.get(name) or values.get("text_config", {}).get(name) for name in names):
            raise DataError(
                f"{folder}/config.json has no {key}", fix="export the model from a complete folder"
            )
    unknown = [name for name in values["architectures"] if not hasattr(transformers, name)]
    if unknown:
        raise DataError(
            f"{folder}/config.json names an architecture that transformers lacks", found=unknown[0]
        )
    text = config.get_text_config(decoder=True)
    written = values.get("rope_parameters") or values.get("text_config", {}).get("rope_parameters")
    context = text.max_position_embeddings
    if written is not None and rope_meaning(text.rope_parameters, context) != rope_meaning(written, context):
        raise DataError(
            "the RoPE in config.json is read as another", found=text.rope_parameters, allowed=written
        )
    _check_weights(folder, config)
    return _missing(folder, text.vocab_size)


def _check_weights(folder: Path, config: Any) -> None:
    """Let transformers read the folder with tensors that have shapes and no values, as its loader renames them."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if not index.is_file() and [file.name for file in files] != ["model.safetensors"]:
        raise DataError(
            f"{folder} has several weight files and no index", found=", ".join(f.name for f in files)
        )
    places = read_json(index)["weight_map"] if index.is_file() else {}
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                found[name] = torch.empty(tensors.get_slice(name).get_shape(), device="meta")
                if places and places.get(name) != file.name:
                    raise DataError(f"{index} does not say that {name} is in {file.name}")
    family: Any = AutoModelForCausalLM._model_mapping[type(config)]
    try:
        with _without_reports():
            _, report = family.from_pretrained(
                None, config=config, state_dict=found, device_map={"": "meta"},
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except RuntimeError as error:
        # Experts of different shapes make no tensor together.
        raise DataError(
            f"the weights in {folder} are not those of its config.json", found=str(error).strip()[:200]
        ) from error
    wrong = sorted({
        *report["missing_keys"], *report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])
    })  # fmt: skip
    if wrong:
        raise DataError(
            f"the weights in {folder} are not those of its config.json",
            found=f"{len(wrong)} missing, unknown or of another shape: {', '.join(wrong[:4])}",
        )


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Keep transformers from printing a table of what does not fit, which becomes a message here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)


def _missing(folder: Path, vocab_size: int) -> list[str]:
    notes = []
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        notes.append("there is no tokenizer: name one with --tokenizer")
    elif (folder / "tokenizer.json").is_file():
        tokenizer = read_json(folder / "tokenizer.json")
        ids = (
            [*tokenizer["model"].get("vocab", {}).values()]
            if isinstance(tokenizer["model"].get("vocab"), dict)
            else []
        )
        ids += [token["id"] for token in tokenizer.get("added_tokens") or ()]
        if ids and max(ids) >= vocab_size:
            notes.append(f"the tokenizer has ids up to {max(ids)}, the model embeds {vocab_size}")
    if not (folder / "tokenizer_config.json").is_file():
        notes.append("there is no tokenizer_config.json: transformers guesses the kind of tokenizer")
    generation = (
        read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    )
    if generation.get("eos_token_id", read_json(folder / "config.json").get("eos_token_id")) is None:
        notes.append("no eos_token_id is set: generation ends at its longest only")
    return notes


def _check_finite(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Refuse weights that are not finite, or would not be in another type."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        largest = parameter.detach().abs().max()
        if not bool(largest.isfinite()):
            raise DataError("a weight of the model is not finite", found=f"{name}: {largest:g}")
        if dtype is not None and not bool(largest.to(dtype).isfinite()):
            raise DataError(
                f"a weight becomes infinite in {str(dtype).removeprefix('torch.')}",
                found=f"{name}: {largest:g}",
                allowed=f"up to {torch.finfo(dtype).max:g}",
                fix="write it in bfloat16 or float32 (--dtype)",
            )


def _overflow(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Return a note where what layers hand on, computed in the type of the weights, is beyond that type."""
    if dtype != torch.float16:
        return []
    largest = 0.0
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    ids = _probe(model)
    with torch.no_grad():
        for states in backbone(model)(
            input_ids=ids, use_cache=False, output_hidden_states=True
        ).hidden_states:
            largest = max(largest, float(states.abs().max()))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if largest <= torch.finfo(dtype).max:
        return []
    return [f"layers hand on values up to {largest:.3g}, which are infinite in float16: compute in bfloat16"]


def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Return logits [tokens, vocabulary] of fixed random tokens, in float32."""
    with torch.no_grad():
        return model(input_ids=_probe(model), use_cache=False).logits[0].float()


def _probe(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive_seed(0, "export", "probe"))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator).to(model.device)


def _round(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Cast the parameters of a model, in place; return the largest change of a logit, computed in float32."""
    _check_finite(model, dtype)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.data = parameter.data.float()
    before = _logits(model)
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype).float()
    error = float((_logits(model) - before).abs().max())
    # Buffers, the frequencies of RoPE among them, keep their type.
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return error


def _write_generation(model: PreTrainedModel, folder: Path, origin: str | Path | None) -> None:
    source = Path(origin) / "generation_config.json" if origin is not None else None
    if source is not None and source.is_file():
        shutil.copyfile(source, folder / source.name)
    else:
        write_json(folder / "generation_config.json", model.generation_config.to_diff_dict())
