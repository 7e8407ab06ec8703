"""The stage of a recipe: length, duration, batch, rate, RoPE and what is learnt."""

from __future__ import annotations

import json
import math
from typing import Any

from longspan.core.errors import ConfigError
from longspan.train.translate.data import Streams
from longspan.train.translate.draft import RecipeDraft
from longspan.train.translate.sources import part_of, read_source

__all__ = ["put_stage"]


def put_stage(draft: RecipeDraft, streams: Streams) -> None:
    """Set the one stage that a config of another trainer is."""
    stage, meant = draft.stage, draft.meant
    stage["name"] = "train"
    length = meant.count("context_length")
    positions = meant.count("positions")
    if length is None and positions is not None:
        length = positions
    elif positions is not None:
        meant.idle(["positions"], "the positions of the model follow from context_length")
    if length is None and meant.table.facts.get("length_of_model"):
        length = _own_positions(draft)
    if length is None:
        draft.missing["stages.0.context_length"] = "the length of a row"
        length = 0
    else:
        stage["context_length"] = length
    _put_duration(draft)
    _put_batch(draft, length)
    rate = _put_rate(draft)
    _put_schedule(draft, rate)
    _put_rope(draft, length)
    _put_pose(draft)
    stage["objective"] = streams.objective
    if not streams.apart:
        stage["document_mask"] = False
    if streams.shares:
        stage["shares"] = streams.shares
    stage["streams"] = streams.streams


def _put_duration(draft: RecipeDraft) -> None:
    stage, meant = draft.stage, draft.meant
    steps, of_epoch = meant.whole("steps"), meant.count("steps_per_epoch")
    if of_epoch is not None:
        steps = round(of_epoch * (meant.number("epochs") or 1))
        draft.remarks.append(
            "steps are `max_steps_per_epoch` times `epochs`: an epoch there ends there, whatever it has read"
        )
    if steps is not None and steps > 0:
        stage["steps"] = steps
        if of_epoch is None:
            meant.idle(["epochs"], f"{steps} steps outrank it, there too")
        draft.remarks.append(
            "so many steps go round the data there as often as it takes; here `max_epochs` of the stage has to allow it"
        )
    else:
        epochs = meant.number("epochs")
        meant.idle(["steps"], "asks for nothing: epochs count")
        stage["epochs"] = epochs if epochs is not None and epochs > 0 else 1
        if meant.given("epochs") and not (epochs or 0) > 0:
            meant.leave("epochs", "a run of no epochs trains nothing; one is set")


def _put_batch(draft: RecipeDraft, length: int) -> None:
    """Set the batch: micro-batch x accumulation x processes that read different rows, in rows of the length."""
    stage, meant = draft.stage, draft.meant
    parallel = draft.recipe.get("parallel", {})
    readers = parallel.get("dp_shard", 1) * parallel.get("dp_replicate", 1)
    micro = meant.count("micro_batch") or 1
    accumulation = meant.count("accumulation", f"stages.0.batch_tokens, with {readers} that read rows")
    rows = meant.count("batch_rows")
    if rows is not None:
        meant.idle(["accumulation"], "the whole batch is given")
        rows *= readers
    elif accumulation is not None:
        rows = micro * accumulation * readers
    else:
        least = meant.table.facts.get("rows_at_least", 0)
        rows = (
            micro * max(1, math.ceil(least / (micro * draft.processes))) * readers
            if draft.processes
            else micro
        )
        if least:
            draft.remarks.append(
                f"no gradient_accumulation_steps: a step has at least {least} rows there, and {rows} here"
            )
    if rows < micro:
        micro = rows
    stage["batch_tokens"] = rows * length
    stage["micro_batch_tokens"] = micro * length


def _put_rate(draft: RecipeDraft) -> float:
    meant, facts = draft.meant, draft.meant.table.facts
    rate = meant.number("lr")
    if rate is None and "lr_full" in facts:
        rate = facts["lr_full"] if draft.adapter is None else facts["lr_adapter"]
        meant.default("lr", rate)
    if rate is None:
        draft.missing["stages.0.lr"] = "the learning rate"
        return math.nan
    draft.stage["lr"] = rate
    return rate


def _put_schedule(draft: RecipeDraft, rate: float) -> None:
    meant = draft.meant
    theirs = str(meant.take("lr_kind"))
    kind = meant.choice(
        "lr_kind", otherwise="cosine", do="cosine is set: `lr_schedule` has cosine, linear and constant"
    )
    schedule: dict[str, Any] = {"kind": kind}
    floor = meant.number("lr_floor")
    options = meant.take("lr_options")
    options = _mapping(draft, options) if options is not None else {}
    if "min_lr_rate" in options:
        floor = meant.as_number(options.pop("min_lr_rate"), "min_lr_rate")
    if "min_lr" in options and rate:
        floor = meant.as_number(options.pop("min_lr"), "min_lr") / rate
    steps = draft.stage.get("steps")
    if kind != "constant":
        if "num_decay_steps" in options and steps:
            decay = meant.as_number(options.pop("num_decay_steps"), "num_decay_steps")
            schedule["decay_fraction"] = min(1.0, decay / steps)
        schedule["floor"] = 0.0 if floor is None else floor
    elif floor is not None:
        meant.leave("lr_floor", "a constant rate does not fall")
    if options:
        meant.leave("lr_options", f"{', '.join(map(str, options))}: see `lr_schedule` for what there is")
    warmup = meant.steps("warmup_steps")
    if warmup is None:
        warmup = meant.number("warmup_ratio", "stages.0.lr_schedule.warmup_steps, as a share of the steps")
        if warmup is not None and not 0 <= warmup < 1:
            raise ConfigError(
                f"{meant.where}: the warm-up is a share of the run", found=warmup, allowed="0 to 1"
            )
    else:
        meant.idle(["warmup_ratio"], "warmup_steps outranks it, there too")
    if theirs == "constant" and warmup:
        meant.idle(["warmup_steps", "warmup_ratio"], "the schedule `constant` has no warm-up there")
    elif warmup:
        schedule["warmup_steps"] = warmup
    draft.stage["lr_schedule"] = schedule


def _mapping(draft: RecipeDraft, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{draft.meant.where}: a schedule's options are a mapping", found=draft.meant.take("lr_options")
        )
    return dict(value)


def _put_rope(draft: RecipeDraft, length: int) -> None:
    meant = draft.meant
    theta = meant.number("rope_theta")
    scaling = meant.take("rope_scaling")
    longest = meant.count("rope_length")
    if isinstance(scaling, str) and scaling.lstrip().startswith("{"):
        try:
            scaling = json.loads(scaling)
        except ValueError:
            raise ConfigError(
                f"{meant.where}: rope_scaling is neither a name nor a mapping", found=scaling
            ) from None
    if scaling is None:
        if theta is not None:
            draft.stage["rope"] = {"rope_type": "default", "rope_theta": theta}
        return
    if isinstance(scaling, dict):
        rope = {"rope_type": scaling.get("rope_type", scaling.get("type", "default"))}
        rope |= {name: value for name, value in scaling.items() if name not in ("rope_type", "type")}
    else:
        rope = {"rope_type": str(scaling)}
    if theta is not None:
        rope["rope_theta"] = theta
    # By name, a tool counts from before the model's own scaling; transformers counts from all positions.
    own = _own_positions(draft, unscaled=not isinstance(scaling, dict))
    wanted = longest or length
    if not isinstance(scaling, dict):
        if own is None:
            meant.leave(
                "rope_scaling",
                f"its factor follows from the model's own length, and the model is not at hand: set the stage's "
                f"`rope: {{rope_type: {scaling}, factor: F}}`, F = {wanted} / max_position_embeddings, rounded up",
            )
            draft.remarks.append(
                f"rope_scaling: {scaling} is NOT in the recipe, since the model's own length is not known"
            )
            return
        if wanted <= own:
            meant.idle(
                ["rope_scaling"], f"rows of {wanted} do not go beyond the model's {own} positions, there too"
            )
            return
        rope["factor"] = float(math.ceil(wanted / own))
    if rope["rope_type"] in ("yarn", "llama3") and "original_max_position_embeddings" not in rope:
        if own is None:
            meant.leave(
                "rope_scaling", "set `original_max_position_embeddings` too: the model is not at hand to ask"
            )
            return
        rope["original_max_position_embeddings"] = own
    if rope["rope_type"] == "llama3":
        rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **rope}
    if rope["rope_type"] not in ("yarn", "llama3", "longrope"):
        rope.pop("original_max_position_embeddings", None)
    draft.stage["rope"] = rope


def _own_positions(draft: RecipeDraft, *, unscaled: bool = False) -> int | None:
    """Return the positions of the model, where its config.json is at hand; `unscaled`: before a scaling of its own."""
    path = draft.recipe.get("model", {}).get("path")
    folder = None if path is None else draft.at_hand(path)
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        config = read_source(folder / "config.json", ()).values
    except ConfigError:
        return None
    # Models of text and images.
    config = part_of(config, "text_config") or config
    own = config.get("max_position_embeddings")
    if unscaled:
        scaling = part_of(config, "rope_scaling") or part_of(config, "rope_parameters")
        own = scaling.get("original_max_position_embeddings") or own
    return own if isinstance(own, int) and own > 0 else None


def _put_pose(draft: RecipeDraft) -> None:
    meant = draft.meant
    if not meant.flag("pose"):
        meant.idle(["pose_target", "pose_chunks"], "PoSE is off")
        return
    target = meant.count("pose_target")
    if target is None:
        draft.missing["stages.0.pose.target_length"] = "PoSE's target length"
        return
    draft.stage["pose"] = {"target_length": target, "chunks": meant.count("pose_chunks") or 2}
