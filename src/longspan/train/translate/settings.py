"""The parts of a recipe around its stage: model, adapter, optimizer, processes, memory, tracking."""

from __future__ import annotations

import math
import re
from typing import Any

from longspan.core.errors import ConfigError
from longspan.train.translate.draft import RecipeDraft
from longspan.train.translate.sources import part_of, read_source

__all__ = ["put_machine", "put_model", "put_optimizer", "put_parallel", "put_tracking"]

_LORA = (
    "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_all", "lora_attention", "lora_mlp", "lora_output",
    "lora_parameters", "lora_trainable", "dora", "rslora",
)  # fmt: skip
_QUANTIZE = ("quantize_type", "double_quant", "quantize_dtype")
_MLP = ["gate_proj", "up_proj", "down_proj"]
TILE = 8192
"""Tokens of a tile of an MLP where the tool chooses them itself."""


def put_model(draft: RecipeDraft) -> None:
    """Set the model, its adapter and the types of its weights."""
    meant = draft.meant
    model = meant.text("model")
    if model is None:
        draft.missing["model.path"] = "the model"
    draft.put("model", "path", model)
    tokenizer = meant.text("tokenizer")
    if tokenizer is not None and tokenizer == model:
        meant.idle(["tokenizer"], "is that of the model")
    elif tokenizer is not None:
        draft.recipe["tokenizer"] = tokenizer
        if draft.at_hand(tokenizer) is None:
            draft.remarks.append(
                f"the tokenizer {tokenizer} is a folder here: `longspan data fetch {tokenizer} --type model`"
            )
    overrides = {each.key.rpartition(".")[2]: each.value for each in meant.found.get("model_overrides", [])}
    for each in meant.found.get("model_overrides", []):
        meant.note(each, "translated", "model.config_overrides")
    draft.put("model", "config_overrides", overrides or None)
    draft.adapter = _adapter(draft)
    if draft.adapter is not None:
        draft.recipe["lora"] = _lora(draft)
    else:
        why = "all weights are trained"
        meant.idle([*_LORA, *_QUANTIZE, "quantize_bits", "quantize_4bit", "quantize_8bit"], why)
    _types(draft)


def _adapter(draft: RecipeDraft) -> str | None:
    meant = draft.meant
    builder = (meant.text("builder") or "").rpartition(".")[2]
    if meant.given("use_lora") or "use_lora" in meant.table.translated.values():
        return "lora" if meant.flag("use_lora") else None
    if builder:
        if builder.startswith(("lora_", "qlora_")):
            return builder.partition("_")[0]
        meant.idle(["builder"], "sizes are read from the config.json in the model's folder")
        return None
    chosen = meant.choice("adapter", otherwise=None)
    return None if chosen is None else str(chosen)


def _lora(draft: RecipeDraft) -> dict[str, Any]:
    meant, facts = draft.meant, draft.meant.table.facts
    rank = meant.count("lora_rank") or 8
    alpha = meant.number("lora_alpha")
    if alpha is None:
        alpha = facts.get("alpha_per_rank", 1) * rank
        meant.default("lora_alpha", alpha)
    if meant.flag("rslora", "lora.alpha, times the square root of the rank"):
        alpha *= math.sqrt(rank)
    lora: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": meant.number("lora_dropout") or 0.0}
    lora["target_modules"] = _targets(draft)
    if parameters := meant.texts("lora_parameters"):
        lora["target_parameters"] = parameters
    if trainable := meant.texts("lora_trainable"):
        lora["trainable"] = trainable
    if meant.flag("dora"):
        lora["dora"] = True
    if _quantized(draft):
        lora["quantize"] = "nf4"
        double = meant.flag("double_quant")
        lora["double_quant"] = True if double is None else double
        if str(meant.take("quantize_type") or "nf4") != "nf4":
            meant.leave("quantize_type", "the base is stored as nf4, of the same size")
        kind = meant.text("quantize_dtype") or "bfloat16"
        if kind not in ("bfloat16", "float32"):
            meant.leave("quantize_dtype", "products are computed in bfloat16, which has the range of float32")
        lora["compute_dtype"] = "float32" if kind == "float32" else "bfloat16"
    else:
        meant.idle(_QUANTIZE, "the base is not quantised")
    return lora


def _targets(draft: RecipeDraft) -> Any:
    meant = draft.meant
    attention = meant.texts("lora_attention")
    if attention:
        names = ["o_proj" if each == "output_proj" else each for each in attention]
        names += _MLP if meant.flag("lora_mlp") else []
        if meant.flag("lora_output"):
            meant.leave(
                "lora_output",
                "the output embedding gets no adapter; `lora.trainable: [lm_head]` trains it whole",
            )
        return names
    everything = meant.flag("lora_all")
    if any(re.search(r"[\\^$|()*\[\]]", str(each)) for each in _listed(meant.take("lora_targets"))):
        meant.leave(
            "lora_targets", "a pattern; name the layers by the end of their names, such as [q_proj, v_proj]"
        )
        return "all-linear"
    named = meant.texts("lora_targets")
    if named and named not in (["all"], ["all-linear"], ["all_linear"]):
        return "all-linear" if everything else named
    if named or everything:
        return "all-linear"
    if meant.table.name == "TRL":
        draft.remarks.append(
            "no lora_target_modules: peft has its own for each family there, mostly q_proj and v_proj, as set here"
        )
        return ["q_proj", "v_proj"]
    return "all-linear"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _quantized(draft: RecipeDraft) -> bool:
    """Whether the frozen base is stored in 4 bits."""
    meant = draft.meant
    bits = meant.whole("quantize_bits")
    four = meant.flag("quantize_4bit")
    if (bits is not None and bits not in (4, 16, 32)) or meant.flag("quantize_8bit"):
        words = "the base is of 16 bits here, or of 4: set `lora.quantize: nf4` to save memory"
        meant.leave("quantize_bits", words)
        meant.leave("quantize_8bit", words)
        draft.remarks.append(f"quantisation: {words}")
    return draft.adapter == "qlora" or bits == 4 or bool(four)


def _types(draft: RecipeDraft) -> None:
    """Set the type of the weights and of the computation."""
    meant = draft.meant
    bf16, fp16 = meant.flag("bf16"), meant.flag("fp16")
    precision = meant.text("precision")
    full = precision in ("fp32", "float32") or (bf16 is False and not fp16)
    weights = meant.text("dtype")
    if fp16:
        meant.leave("fp16", "computed in bfloat16, which has the range of float32 and needs no loss scaling")
        draft.remarks.append("float16 is not here: `memory.compute_dtype: bfloat16`")
    if draft.adapter is not None:
        draft.put("model", "dtype", "float32" if full or weights == "float32" else "bfloat16")
        if weights not in (None, "bfloat16", "float32", "auto"):
            meant.leave("dtype", "frozen weights are bfloat16 here")
    elif weights is not None and weights != "float32":
        meant.idle(
            ["dtype"],
            "weights that are trained stay float32 beside bfloat16 computation, which loses no small updates",
        )
    draft.put("memory", "compute_dtype", "float32" if full else "bfloat16")
    if meant.flag("pure_bf16"):
        words = (
            "bfloat16 weights lose updates below 0.4 % of them; `model.dtype: bfloat16` has it all the same"
        )
        meant.leave("pure_bf16", words)


def put_optimizer(draft: RecipeDraft) -> None:
    """Set optimizer and gradient clipping."""
    meant = draft.meant
    name = meant.choice(
        "optimizer",
        otherwise="adamw",
        do="AdamW trains here: set its rate (`stages.0.lr`) for it, or `optimizer.name: muon`",
    )
    if meant.flag("muon"):
        name = "muon"
    if name == "adamw of 8 bits":
        draft.remarks.append(
            "the moments of AdamW are of 32 bits here, 8 bytes a trained parameter, and of 8 bits there"
        )
    draft.put("optimizer", "name", "muon" if name == "muon" else "adamw")
    betas = meant.take("betas")
    if betas is None:
        betas = [meant.number("beta1"), meant.number("beta2")]
    draft.put("optimizer", "betas", betas)
    draft.put("optimizer", "eps", meant.number("eps"))
    draft.put("optimizer", "weight_decay", meant.number("weight_decay"))
    clip = meant.number("max_grad_norm", endless=True)
    never = clip == 0 or (clip is None and "max_grad_norm" in meant.table.defaults)
    draft.put("optimizer", "max_grad_norm", math.inf if never else clip)
    loss = meant.number("aux_loss")
    draft.put("router", "aux_loss", loss or None)


def put_parallel(draft: RecipeDraft) -> None:
    """Set the processes: those that share a sequence, the rest by rows.

    Raises:
        ConfigError: degrees that the processes cannot be divided into.
    """
    meant = draft.meant
    ring, ulysses = meant.count("cp_ring") or 1, meant.count("cp_ulysses") or 1
    shard, copies = meant.whole("dp_shard"), meant.count("dp_replicate")
    shard = None if shard is not None and shard < 1 else shard
    known = draft.processes
    cp = ring * ulysses
    draft.processes = known or cp * (shard or 1) * (copies or 1)
    if draft.processes % cp:
        raise ConfigError(
            f"{meant.where}: {cp} processes share a sequence, which do not divide {draft.processes}",
            fix="give --processes",
        )
    rows = draft.processes // cp
    sharded = _sharded(draft) or shard is not None
    if copies is None:
        copies = 1 if sharded else rows
    if rows % copies or (shard is not None and copies * shard != rows):
        raise ConfigError(
            f"{meant.where}: {rows} processes read rows, which are not {copies} copies of {shard or 'some'} shards",
            fix="give --processes",
        )
    shards = rows // copies
    for name, degree in (
        ("cp_ring", ring),
        ("cp_ulysses", ulysses),
        ("dp_shard", shards),
        ("dp_replicate", copies),
    ):
        draft.put("parallel", name, degree if degree > 1 else None)
    if known is None:
        draft.remarks.append(
            f"the file does not say how many GPUs it ran on: the batch is that of {draft.processes}; give --processes N"
        )
    timeout = meant.number("timeout", endless=True)
    if timeout is not None and timeout > 86400:
        meant.leave(
            "timeout",
            "a process that makes no progress ends after 10 minutes; set `parallel.timeout_seconds`",
        )
        timeout = None
    draft.put("parallel", "timeout_seconds", timeout)


def _sharded(draft: RecipeDraft) -> bool:
    """Whether parameters are sharded over processes; sets what goes to host memory."""
    meant = draft.meant
    sharded = offload = False
    deepspeed = meant.take("deepspeed")
    if deepspeed is not None:
        stage, offload = _zero(draft, deepspeed)
        sharded = stage >= 2
    fsdp = meant.take("fsdp")
    words = (
        fsdp.replace(",", " ").split()
        if isinstance(fsdp, str)
        else fsdp
        if isinstance(fsdp, list)
        else [fsdp]
    )
    for word in (str(each) for each in words if each not in (None, False)):
        sharded |= meant.table.values.get("sharding", {}).get(word, "sharded") == "sharded"
        offload |= word == "offload"
    sharded |= meant.take("sharded") is not None
    if meant.flag("offload") or offload:
        draft.put("memory", "offload_parameters", True)
    return sharded


def _zero(draft: RecipeDraft, value: Any) -> tuple[int, bool]:
    """Return stage and offloading of a DeepSpeed config: a mapping, a file, or what its name says."""
    where = None if isinstance(value, dict) else draft.at_hand(str(value))
    config = value
    if where is not None and where.is_file():
        config = read_source(where, ()).values
    if isinstance(config, dict):
        zero = part_of(config, "zero_optimization")
        targets = [zero.get(name) for name in ("offload_optimizer", "offload_param")]
        offload = any(isinstance(each, dict) and each.get("device") in ("cpu", "nvme") for each in targets)
        if own := [name for name in ("optimizer", "scheduler") if name in config]:
            draft.remarks.append(
                f"the DeepSpeed config has its own {' and '.join(own)}, which outranks the file's there: compare"
            )
        stage = zero.get("stage", 0)
        return (stage if isinstance(stage, int) else 0), offload
    name = str(value).lower()
    found = re.search(r"z(?:ero)?[_-]?([0-3])", name)
    stage = int(found[1]) if found else 3
    draft.remarks.append(
        f"DeepSpeed by the name of {value}, its file was not read: ZeRO-{stage}{', offloading' * ('offload' in name)}"
    )
    return stage, "offload" in name


def put_machine(draft: RecipeDraft) -> None:
    """Set what saves memory, the seed, and when training state is saved."""
    meant = draft.meant
    ways = meant.take("checkpointing")
    offloaded = meant.flag("activation_offload") or (isinstance(ways, str) and ways.startswith("offload"))
    on = meant.flag("checkpointing") and not meant.flag("no_checkpointing")
    draft.put("memory", "activation_checkpointing", "offload" if offloaded else "full" if on else None)
    if meant.flag("tiled_mlp"):
        draft.put("memory", "tiled_mlp", TILE)
    if meant.flag("compile"):
        draft.put("runtime", "compile_blocks", True)
    draft.put("runtime", "empty_cache_every", meant.count("empty_cache"))
    seed = meant.whole("seed")
    if seed is None:
        draft.remarks.append("no seed: another is drawn for each run there, and it is 0 here")
    else:
        draft.recipe["seed"] = seed
    every = meant.steps("save_steps")
    if every is not None and 0 < every < 1:
        meant.leave("save_steps", "a share of the run there; set `checkpoint.every_steps`")
        every = None
    draft.put("checkpoint", "every_steps", None if every is None or every < 1 else every)
    keep = meant.whole("keep")
    draft.put("checkpoint", "keep", None if keep is None or keep < 1 else keep)


def put_tracking(draft: RecipeDraft) -> None:
    """Set where metrics go."""
    meant = draft.meant
    trackers = {each.lower() for each in meant.texts("trackers")}
    logger = (meant.text("tracker_class") or "").rpartition(".")[2].lower()
    project = meant.text("wandb_project")
    if meant.flag("tensorboard") or "tensorboard" in trackers or logger == "tensorboardlogger":
        draft.put("tracking", "tensorboard", True)
    asked = meant.flag("wandb")
    wanted = (
        "wandb" in trackers
        or logger == "wandblogger"
        or (asked if asked is not None else bool(project and not trackers))
    )
    if wanted:
        wandb = {
            "project": project or "huggingface",
            "entity": meant.text("wandb_entity"),
            "name": meant.text("run_name"),
        }
        draft.put("tracking", "wandb", {name: value for name, value in wandb.items() if value is not None})
    if others := trackers - {"wandb", "tensorboard", "none", "all"}:
        meant.leave("trackers", f"{', '.join(sorted(others))}: trackers here are tensorboard and wandb")
    if logger and logger not in ("wandblogger", "tensorboardlogger"):
        meant.idle(["tracker_class"], "every step is written to metrics.jsonl of the run folder")
