"""AdamW moments that transformers' Trainer left in `checkpoint-*/optimizer.pt`.

The file numbers parameters: first those with weight decay, then those without, each in the order of the model. Which
are without has changed over its versions, so every rule there was is tried, and numbers and shapes have to fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from longspan.core.errors import ConfigError, DataError
from longspan.core.log import get_logger
from longspan.models.lora import apply_lora
from longspan.models.torch_file import read_torch_file
from longspan.train.checkpoint import Checkpoint, read_checkpoint
from longspan.train.config import TrainConfig
from longspan.train.known_models import KnownModel
from longspan.train.stage_model import check_tensors, empty_stage_model

__all__ = ["TrainerMoments", "check_init", "find_trainer_checkpoint", "read_trainer_moments"]

FILE = "optimizer.pt"
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
# What Trainer leaves where FSDP or DeepSpeed hold the optimizer.
SHARDED = ("optimizer.bin", "optimizer_0", "pytorch_model_fsdp_0", "zero_to_fp32.py", "global_step*")
WITHOUT_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class TrainerMoments(NamedTuple):
    """Moments by `<parameter>/<entry>`, as `load_optimizer_tensors` takes them."""

    names: list[str]
    read: Callable[[str, int, int | None], torch.Tensor]
    """Returns rows of a tensor: (name, first row, number of rows or None for all)."""


def find_trainer_checkpoint(path: Path) -> Path | None:
    """Return the newest `checkpoint-*` of a Trainer's folder, or `path` if it is one; None: it is neither."""
    numbered = [
        (int(found[1]), folder)
        for folder in path.glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    ]
    folder = max(numbered)[1] if numbered else path
    traces = (FILE, "trainer_state.json", *SHARDED)
    return folder if any(any(folder.glob(name)) for name in traces) else None


def check_init(config: TrainConfig, root: Path, known: KnownModel) -> None:
    """Refuse an `init_from` that is not a checkpoint, or one of a Trainer that cannot be continued, before work.

    Raises:
        ConfigError: the recipe wants the weights of a Trainer's checkpoint, or has another optimizer.
        DataError: nothing is there, or as `read_trainer_moments`.
    """
    init = config.init_from
    assert init is not None
    folder = find_trainer_checkpoint(root / init.path)
    if folder is None:
        ours = read_checkpoint(root / init.path, verify=False)
        model = _empty(config, known)
        if init.weights:
            check_tensors(model, ours)
        if init.optimizer:
            _check_moments(model, ours)
        return
    if init.weights:
        raise ConfigError(
            f"{folder} is of a Hugging Face Trainer, of which init_from takes the moments alone",
            fix="name the folder in model.path for its weights; init_from: {weights: false, optimizer: true}",
        )
    if config.optimizer.name != "adamw":
        raise ConfigError(
            f"the moments in {folder} are those of AdamW", found=config.optimizer.name, allowed="adamw"
        )
    read_trainer_moments(folder, _empty(config, known), config)


def _empty(config: TrainConfig, known: KnownModel) -> nn.Module:
    """Return the model of the first stage without values, with its adapter."""
    model = empty_stage_model(config, config.stages[0], known)
    if config.lora is None:
        return model
    # Names and shapes alone count, and 4 bits change those of frozen weights only.
    return apply_lora(model, config.lora.model_copy(update={"quantize": "none"}), seed=config.seed)


def _check_moments(model: nn.Module, state: Checkpoint) -> None:
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if value.requires_grad}
    wrong = set()
    for key, shape in state.optimizer.shapes.items():
        name, _, entry = key.rpartition("/")
        if name not in shapes or (entry != "step" and shape != shapes[name]):
            wrong.add(name)
    if wrong:
        raise DataError(f"the moments in {state.path} are not those of this model", found=sorted(wrong)[:4])


def read_trainer_moments(folder: Path, model: nn.Module, config: TrainConfig) -> TrainerMoments:
    """Match the moments in a Trainer's checkpoint with the parameters of a model that require gradients.

    Raises:
        DataError: no optimizer.pt, one of FSDP or DeepSpeed, not of AdamW, or not of this model.
    """
    file = folder / FILE
    if not file.is_file():
        sharded = sorted(found.name for name in SHARDED for found in folder.glob(name))
        raise DataError(
            f"{folder} holds no {FILE}",
            found=f"that of FSDP or DeepSpeed: {', '.join(sharded)}" if sharded else "weights alone",
            allowed="a checkpoint of one process or of plain data parallelism",
        )
    saved = read_torch_file(file)
    state, groups = _parts(saved, file)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    by_number = _match(state, groups, parameters, model, file)
    _compare_settings(groups, config, file)
    tensors = {
        f"{by_number[number]}/{entry}": value
        for number, entries in state.items()
        for entry, value in entries.items()
    }

    def read(name: str, start: int, rows: int | None) -> torch.Tensor:
        parameter, _, entry = name.rpartition("/")
        if entry == "step":
            return torch.as_tensor(tensors[name], dtype=torch.float32).clone()
        whole = tensors[name].to(parameters[parameter].dtype)
        return whole if rows is None else whole[start : start + rows]

    return TrainerMoments(list(tensors), read)


def _parts(saved: Any, file: Path) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """Return state by number and groups of what torch's AdamW saves."""
    state = saved.get("state") if isinstance(saved, Mapping) else None
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(groups, list) or not state:
        raise DataError(
            f"{file} is not the state of a torch optimizer",
            found=", ".join(map(str, saved))[:100] if isinstance(saved, Mapping) else type(saved).__name__,
            allowed="state and param_groups; DeepSpeed's cannot be read",
        )
    if not all(isinstance(number, int) for number in state):
        raise DataError(
            f"{file} names parameters, as FSDP does",
            found=str(next(iter(state))),
            allowed="parameters by number",
        )
    for number, entries in state.items():
        if set(entries) != MOMENTS or entries["exp_avg"].shape != entries["exp_avg_sq"].shape:
            raise DataError(
                f"{file} is not of AdamW", found=f"parameter {number}: {', '.join(sorted(entries))}",
                allowed=", ".join(sorted(MOMENTS)),
            )  # fmt: skip
    return dict(state), groups


def _match(
    state: Mapping[int, Mapping[str, Any]],
    groups: list[dict[str, Any]],
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
    file: Path,
) -> dict[int, str]:
    """Return the name of each number: of the one rule by which numbers and shapes fit."""
    numbers = [list(group["params"]) for group in groups if group["params"]]
    fitting = []
    for names in _groupings(model, list(parameters)):
        if [len(group) for group in names] != [len(group) for group in numbers]:
            continue
        by_number = dict(zip(chain(*numbers), chain(*names)))
        shapes = ((entries["exp_avg"].shape, by_number.get(number)) for number, entries in state.items())
        if all(name is not None and shape == parameters[name].shape for shape, name in shapes):
            fitting.append(by_number)
    if len({tuple(found.items()) for found in fitting}) != 1:
        raise DataError(
            f"the moments in {file} are not those of this model" if not fitting
            else f"the moments in {file} fit this model in more than one way",
            found=f"groups of {' and '.join(str(len(group)) for group in numbers)} parameters",
            allowed="of " + " or ".join(sorted({
                " and ".join(str(len(group)) for group in names) for names in _groupings(model, list(parameters))
            })) + ", each of its own shape",
            fix="use the model that the run trained, with its adapter if it had one",
        )  # fmt: skip
    return fitting[0]


def _groupings(model: nn.Module, names: list[str]) -> list[list[list[str]]]:
    """Return the groups that versions of Trainer have made: with decay and without, or all in one."""
    norms = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    without: tuple[set[str], ...] = (
        {name for name in names if WITHOUT_DECAY.search(name.lower())} | norms,
        {name for name in names if "bias" in name} | norms,
        set(),
    )
    groupings = [
        [[name for name in names if name not in plain], [name for name in names if name in plain]]
        for plain in without
    ]
    return [[group for group in grouping if group] for grouping in groupings]


def _compare_settings(groups: list[dict[str, Any]], config: TrainConfig, file: Path) -> None:
    """Say where the recipe goes on with other averages than the moments were made with."""
    own = {"betas": tuple(config.optimizer.betas), "eps": config.optimizer.eps}
    theirs = {"betas": tuple(groups[0].get("betas", own["betas"])), "eps": groups[0].get("eps", own["eps"])}
    if theirs != own:
        get_logger("train").warning(
            "the moments in %s were made with %s, the recipe has %s", file, theirs, own
        )
