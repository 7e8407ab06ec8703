"""LoRA, DoRA and QLoRA through peft and bitsandbytes: small trained matrices beside weights that stay as they are.

A linear layer with weight W computes x (W + s B A)^T, with A [rank, in], B [out, rank] and s = alpha / rank
(LoRA, arXiv:2106.09685). DoRA scales the rows of that sum to trained lengths (arXiv:2402.09353). QLoRA keeps W in
4 bits, NF4 in blocks of 64, and computes in a wider type (arXiv:2305.14314).

peft replaces layers inside the model, which stays the transformers model it was: longspan's attention, its loss
without logits, tiles, checkpointing and sharding work on it as before. What is trained is float32, whatever the
type of the rest.

An adapter folder is one of peft's, with three more files:

    README.md                                        how others load it with its RoPE, for which peft has no place
    adapter_config.json, adapter_model.safetensors   as peft writes and reads them
    config.json                                      the model with the RoPE and context length it was trained with
    longspan_adapter.json                            how the base was quantised, and a fingerprint of it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from longspan.core.errors import ArgumentError, DataError
from longspan.core.files import atomic_dir, read_json, sha256_bytes, write_json
from longspan.core.optional import require
from longspan.models.adapter_card import adapter_card
from longspan.models.hf import load_base, own_config, reading_folder, rope_of
from longspan.models.init import seeded
from longspan.models.lora_config import LoraConfig, Quantization
from longspan.models.lora_targets import expert_tensors, is_tied, target_layers, without_numbers
from longspan.models.places import ADAPTER_FILES, OLD_WEIGHTS, OWN_FILE, adapter_base, adapter_folder
from longspan.models.quantize import (
    bitsandbytes,
    linears,
    passed_by,
    quantize,
    replace_layer,
    stored_as,
    without_advice,
)
from longspan.models.side_files import complete_folder
from longspan.models.torch_file import read_torch_file

__all__ = [
    "LoraConfig",
    "adapter_config",
    "adapter_tensors",
    "apply_lora",
    "base_fingerprint",
    "check_lora",
    "detach",
    "is_adapted",
    "load_adapter",
    "save_adapter",
]

PEFT_PREFIX = "base_model.model."
ADAPTER = "default"

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model has an adapter."""
    return bool(getattr(model, "peft_config", None))


def check_lora(model: nn.Module, config: LoraConfig) -> list[str]:
    """Refuse settings that name no layer of a model, or packages that are missing; no weight is looked at.

    Returns:
        What is to be said of experts that get no adapter or are not quantised, which are one tensor a layer and no
        linear layers, and of layers that cannot have one.

    Raises:
        ConfigError: a target that matches nothing; the message lists the linear layers there are.
        MissingDependencyError: peft, or bitsandbytes for nf4, is not installed.
    """
    _peft()
    if config.quantize != "none":
        bitsandbytes()
    places = target_layers(model, config)
    experts = {
        name: weight.numel()
        for name, weight in expert_tensors(model).items()
        if not any(name.startswith(f"{place}.") for place in places.trainable)
    }
    all_weights = sum(weight.numel() for weight in model.parameters())
    notes = []
    if config.target_modules == "all-linear" and (passed := passed_by(model, linears(model))):
        notes.append(
            f"{', '.join(without_numbers(passed))} get no adapter: state-space layers and routers like these read the "
            "weight past it"
        )
    left = {name: count for name, count in experts.items() if name not in places.parameters}
    if left:
        stored = " and are not quantised" if config.quantize != "none" else ""
        notes.append(
            f"{sum(left.values()) / all_weights:.0%} of the weights, the experts, get no adapter{stored}: "
            f"{', '.join(without_numbers(left))}; all-linear and 4 bits are for linear layers, lora.target_parameters "
            "adapts tensors like these"
        )
    reached = {name: count for name, count in experts.items() if name in places.parameters}
    if reached and config.quantize != "none":
        notes.append(
            f"{sum(reached.values()) / all_weights:.0%} of the weights, the experts, get an adapter and are not "
            f"quantised: {', '.join(without_numbers(reached))}; 4 bits are for linear layers"
        )
    return notes


def apply_lora(model: ModelT, config: LoraConfig, *, seed: int) -> ModelT:
    """Freeze a model, quantise its linear layers if asked to, put adapters in it, in place, and return it.

    Before the first step it computes what the (quantised) model computes: B is 0. Only what is to be trained
    requires gradients, and that is float32 (float64 in a float64 model).

    Args:
        model: a causal language model, its weights not yet sharded.
        seed: A is a pure function of it and the config.

    Raises:
        ConfigError: settings that match no layer, or contradict each other.
        ArgumentError: a model that has an adapter already.
        MissingDependencyError: peft or bitsandbytes is not installed.
    """
    peft = _peft()
    if is_adapted(model):
        raise ArgumentError(
            "the model has an adapter already",
            found=str(model.peft_config[ADAPTER].base_model_name_or_path),
            fix="merge it with `longspan export` first",
        )
    places = target_layers(model, config)
    if config.quantization is not None:
        quantize(model, config.quantization, keep=places.trainable)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        # Readers of adapters expect a whole number where it is one.
        lora_alpha=int(config.alpha) if config.alpha.is_integer() else config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.dora,
        target_modules=places.targets,
        target_parameters=places.parameters or None,
        modules_to_save=places.trainable or None,
        ensure_weight_tying=is_tied(model, places.trainable),
    )
    with seeded(seed, "lora"):
        _inject(model, settings)
    return model


def save_adapter(
    model: PreTrainedModel,
    path: str | Path,
    *,
    base: str | Path,
    tokenizer: str | Path | None = None,
    replace: bool = False,
) -> None:
    """Write an adapter folder that `load_adapter` and peft read; it appears whole or not at all.

    Args:
        model: from `apply_lora`, not sharded.
        base: folder or hub name of the model that the adapter was trained beside; local folders are written down
            with their full path.
        tokenizer: folder whose tokenizer files come along.

    Raises:
        ArgumentError: no adapter, or `path` exists and `replace` is false.
        RunError: the disk refuses the bytes.
    """
    if Path(path).exists() and not replace:
        raise ArgumentError(f"{path} already exists", fix="choose another path or remove it")
    tensors = {PEFT_PREFIX + name: value for name, value in adapter_tensors(model).items()}
    origin = str(Path(base).resolve()) if Path(base).exists() else str(base)
    with atomic_dir(path, replace=replace) as folder:
        write_json(folder / ADAPTER_FILES[0], adapter_config(model) | {"base_model_name_or_path": origin})
        # Tied layers are one tensor under two names, which safetensors refuses.
        whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(whole, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        write_json(
            folder / OWN_FILE,
            {"quantization": stored_as(model), "base_fingerprint": base_fingerprint(origin)},
        )
        complete_folder(folder, tokenizer=tokenizer)
        (folder / "README.md").write_text(adapter_card(model, origin), encoding="utf-8")


def load_adapter(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    rope: Mapping[str, Any] | None = None,
    max_position_embeddings: int | None = None,
) -> PreTrainedModel:
    """Load a base model with an adapter: the bits of the forward pass are those of the trained model.

    The RoPE and the context length are those of the adapter's config.json, and the base is quantised as it was in
    training. Folders that peft wrote without these files load too, with the RoPE of the base, or the one that they are
    known to need (`models.known_checkpoints`).

    Args:
        path: adapter folder, or its hub name.
        base: folder or hub name of the base; None = the one that the adapter names.
        dtype: dtype of the base's weights; None = that of the adapter's config.json, else as saved.
        rope, max_position_embeddings: as for `models.hf.load_model`; None = the adapter's.

    Raises:
        DataError: nothing loadable, an adapter that is not LoRA, or one that does not fit the base.
        MissingDependencyError: peft or bitsandbytes is not installed.
    """
    peft = _peft()
    folder = adapter_folder(path) or Path(path)
    settings, own = _read_settings(folder)
    origin = str(base) if base is not None else adapter_base(folder)
    config_of_base = None
    if (folder / "config.json").is_file():
        with reading_folder(folder):
            trained = AutoConfig.from_pretrained(folder)
        if rope is None:
            # One that training left alone may be of a type that nobody can ask for: it is the base's then.
            theirs = rope_of(trained)
            rope = None if theirs == rope_of(own_config(origin)) else theirs
        context = getattr(trained.get_text_config(decoder=True), "max_position_embeddings", None)
        max_position_embeddings = max_position_embeddings or context
        dtype = dtype if dtype is not None else trained.dtype
    else:
        config_of_base = own_config(path, base=origin, as_saved=rope is not None)
    _compare_base(folder, own, origin)
    model = load_base(
        origin, rope=rope, max_position_embeddings=max_position_embeddings, dtype=dtype, config=config_of_base
    )
    known = {name: value for name, value in settings.items() if name in peft.LoraConfig.__dataclass_fields__}
    config = peft.LoraConfig(**{**known, "inference_mode": False})
    if own.get("quantization") is not None:
        how = Quantization.from_dict(own["quantization"], where=str(folder / OWN_FILE))
        quantize(model, how, keep=config.modules_to_save or ())
    try:
        _inject(model, config)
        tensors = _read_tensors(folder)
        _set_tensors(
            model, {name.removeprefix(PEFT_PREFIX): value for name, value in tensors.items()}, where=path
        )
    except (ValueError, KeyError, RuntimeError, SafetensorError, FileNotFoundError) as error:
        raise DataError(
            f"the adapter in {path} does not fit {origin}",
            found=" ".join(line.strip() for line in str(error).strip().splitlines()[:2])[:300],
            fix="name the model that it was trained beside with --base",
        ) from error
    return model


def adapter_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return peft's settings of a model's adapter, as they stand in adapter_config.json."""
    _require_adapter(model)
    values = model.peft_config[ADAPTER].to_dict()
    values["inference_mode"] = True
    # Sets have another order in each process.
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def adapter_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what the adapter has trained, by the names of the base model, as peft names it."""
    _require_adapter(model)
    # Whether embeddings are saved is said by `trainable`; peft would ask the hub how large they were.
    return _peft().get_peft_model_state_dict(model, save_embedding_layers=False)


def detach(model: PreTrainedModel) -> tuple[Any, dict[str, torch.Tensor]]:
    """Take the adapter out of a model, in place; return its peft config and its tensors.

    The model computes what the base computes afterwards.
    """
    peft = _peft()
    config, tensors = model.peft_config[ADAPTER], adapter_tensors(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer) and not name.endswith(".base_layer"):
            # Experts stand in one adapter for each of their tensors.
            replace_layer(model, name, module.get_base_layer())
        elif isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper):
            replace_layer(model, name, module.original_module)
    del model.peft_config
    return config, tensors


def attach(model: PreTrainedModel, config: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Put a detached adapter into a model, in place; return peft's handle of it, which can merge."""
    handle = _inject(model, config)
    _set_tensors(model, tensors, where="the adapter")
    return handle


def base_fingerprint(origin: str | Path) -> str | None:
    """Return 16 hex characters for the weights in a local folder: names, sizes and both ends of each file.

    Cost: 2 MiB read per file. None for a hub name, which is taken as given.
    """
    files = sorted(Path(origin).glob("*.safetensors"))
    if not files:
        return None
    parts = []
    for file in files:
        size, piece = file.stat().st_size, 1 << 20
        with open(file, "rb") as stream:
            head = stream.read(piece)
            stream.seek(max(0, size - piece))
            parts.append(f"{file.name} {size} {sha256_bytes(head)} {sha256_bytes(stream.read(piece))}")
    return sha256_bytes("\n".join(parts).encode())[:16]


def _peft() -> ModuleType:
    with without_advice():
        return require("peft", extra="lora", feature="LoRA")


def _inject(model: PreTrainedModel, config: Any) -> Any:
    """Put peft's layers into the model; what they train becomes float32 at least."""
    peft = _peft()
    dtype = torch.promote_types(model.dtype, torch.float32)
    handle = peft.LoraModel(model, config, ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, peft.utils.other.ModulesToSaveWrapper):
            module.register_forward_pre_hook(_in_the_type_of_the_copy)
            module.register_forward_hook(_in_the_type_of_the_original)
    return handle


def _in_the_type_of_the_copy(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A float32 head takes float32, whatever the layers before it compute in."""
    copy = next(module.modules_to_save[ADAPTER].parameters())
    return tuple(x.to(copy.dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def _in_the_type_of_the_original(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A float32 embedding or norm hands on what its frozen original would: the layers after it are of that type."""
    original = next(module.original_module.parameters(), None)
    return output if original is None else output.to(original.dtype)


def _set_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], *, where: str | Path) -> None:
    expected = adapter_tensors(model)
    wrong = sorted(expected.keys() ^ tensors.keys()) or [
        f"{name} of shape {list(tensors[name].shape)}, not {list(value.shape)}"
        for name, value in expected.items()
        if value.shape != tensors[name].shape
    ]
    if wrong:
        raise DataError(
            f"the tensors in {where} are not those of its adapter_config.json and its base model",
            found=f"{len(wrong)} missing, unknown or of another shape: {', '.join(wrong[:3])}",
            fix="name the model that it was trained beside with --base",
        )
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(tensors[name])


def _require_adapter(model: nn.Module) -> None:
    if not is_adapted(model):
        raise ArgumentError(f"this {type(model).__name__} has no adapter", fix="call apply_lora first")


def _read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return adapter_config.json and what we wrote beside it (nothing, if another tool wrote the folder)."""
    settings = read_json(folder / ADAPTER_FILES[0])
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise DataError(
            f"{folder} holds no LoRA adapter",
            found=settings.get("peft_type") if isinstance(settings, dict) else json.dumps(settings)[:80],
            allowed="peft_type LORA",
        )
    own = read_json(folder / OWN_FILE) if (folder / OWN_FILE).is_file() else {}
    return settings, own


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    file, old = folder / ADAPTER_FILES[1], folder / OLD_WEIGHTS
    if old.is_file() and not file.is_file():
        return dict(read_torch_file(old))
    return load_file(file)


def _compare_base(folder: Path, own: Mapping[str, Any], origin: str) -> None:
    expected, found = own.get("base_fingerprint"), base_fingerprint(origin)
    if expected is not None and found is not None and expected != found:
        raise DataError(
            f"the adapter in {folder} was trained beside other weights than those in {origin}",
            found=found,
            allowed=expected,
            fix="name the model that it was trained beside with --base",
        )
