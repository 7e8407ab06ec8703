"""How a recipe becomes one for this machine, and what is done to the blocks of a model before it is sharded."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel

from longspan.core.log import log_once
from longspan.kernels.attention.flash_versions import use_flash
from longspan.kernels.tiled_mlp import enable_tiled_mlp
from longspan.models.checkpointing import enable_checkpointing
from longspan.models.compiling import compile_blocks
from longspan.train.config import TrainConfig

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def on_machine(config: TrainConfig) -> TrainConfig:
    """Return the recipe with the type it computes in here, and set up the GPU's allocator if there is one.

    On a GPU all weights are trained as fp32 master weights and computed with in bf16, and adapters stand beside weights
    in bf16, unless the recipe says otherwise. To be called before the GPU is used.
    """
    frozen = config.lora is not None
    if config.model.dtype == "bfloat16" and not frozen:
        log_once(
            "train",
            "model.dtype bfloat16 keeps no fp32 copy of the weights and loses most small updates; to compute in "
            "bfloat16 beside fp32 weights set model.dtype: float32 and memory.compute_dtype: bfloat16",
        )
    if not torch.cuda.is_available():
        if emulates_bfloat16(config):
            log_once(
                "train",
                "this CPU has no instructions for bfloat16 and computes in it many times slower: set model.dtype and "
                "memory.compute_dtype to float32",
            )
        return config
    if config.runtime.expandable_segments and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    return on_gpu(config)


def emulates_bfloat16(config: TrainConfig) -> bool:
    """Whether a recipe asks for bfloat16 on a CPU without instructions for it (AVX512_BF16, AMX, ARM's BF16)."""
    if torch.cuda.is_available() or "bfloat16" not in (config.model.dtype, config.memory.compute_dtype):
        return False
    return not any(has for name, has in torch.cpu.get_capabilities().items() if str(name).endswith("bf16"))


def on_gpu(config: TrainConfig) -> TrainConfig:
    """Return the recipe with the type that it computes in on a GPU: bf16, which is what the flash kernels take."""
    told = config.memory.compute_dtype is not None or config.model.dtype != "float32"
    if config.lora is not None and not told and "dtype" not in config.model.model_fields_set:
        # Frozen weights need no wider copy; adapters are fp32 whatever their base is.
        log_once(
            "train",
            "frozen weights are kept and computed with in bfloat16; model.dtype: float32 keeps more",
        )
        return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    if told or config.lora is not None:
        return config
    return config.model_copy(
        update={"memory": config.memory.model_copy(update={"compute_dtype": "bfloat16"})}
    )


def prepare_blocks(model: PreTrainedModel, config: TrainConfig) -> None:
    """Set what blocks keep and how they are run, in place; before they are sharded."""
    if torch.cuda.is_available():
        use_flash(config.runtime.flash)
    if config.memory.tiled_mlp is not None:
        enable_tiled_mlp(model, config.memory.tiled_mlp)
    enable_checkpointing(model, config.memory.activation_checkpointing)
    if config.runtime.compile_blocks:
        compile_blocks(model)
