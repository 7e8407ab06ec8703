"""What a key of another trainer may mean, where a recipe says it, and the reading of the values.

`MEANINGS` is the vocabulary of the tables in `tools/`. `Meant` hands out what a file says by meaning, once, and keeps a
note of what became of each key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from longspan.core.errors import ConfigError
from longspan.train.translate.tables import KeyTable, flattened

__all__ = ["MEANINGS", "Found", "Meant", "Note"]

_STAGE = "stages.0"
_DATA = f"{_STAGE}.streams"
MEANINGS: dict[str, str] = {
    # model
    "model": "model.path",
    "builder": "lora, lora.quantize",
    "tokenizer": "tokenizer",
    "model_overrides": "model.config_overrides",
    "positions": f"{_STAGE}.context_length",
    "dtype": "model.dtype",
    "rope_scaling": f"{_STAGE}.rope",
    "rope_theta": f"{_STAGE}.rope",
    "rope_length": f"{_STAGE}.rope",
    # adapters
    "adapter": "lora",
    "use_lora": "lora",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_targets": "lora.target_modules",
    "lora_all": "lora.target_modules",
    "lora_attention": "lora.target_modules",
    "lora_mlp": "lora.target_modules",
    "lora_output": "lora.target_modules",
    "lora_parameters": "lora.target_parameters",
    "lora_trainable": "lora.trainable",
    "dora": "lora.dora",
    "rslora": "lora.alpha",
    "quantize_bits": "lora.quantize",
    "quantize_4bit": "lora.quantize",
    "quantize_8bit": "lora.quantize",
    "quantize_type": "lora.quantize",
    "double_quant": "lora.double_quant",
    "quantize_dtype": "lora.compute_dtype",
    # optimizer and rate
    "optimizer": "optimizer.name",
    "muon": "optimizer.name",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "betas": "optimizer.betas",
    "eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.max_grad_norm",
    "lr": f"{_STAGE}.lr",
    "lr_kind": f"{_STAGE}.lr_schedule.kind",
    "lr_floor": f"{_STAGE}.lr_schedule.floor",
    "lr_options": f"{_STAGE}.lr_schedule",
    "warmup_steps": f"{_STAGE}.lr_schedule.warmup_steps",
    "warmup_ratio": f"{_STAGE}.lr_schedule.warmup_steps",
    "aux_loss": "router.aux_loss",
    # length and batch
    "context_length": f"{_STAGE}.context_length",
    "epochs": f"{_STAGE}.epochs",
    "steps": f"{_STAGE}.steps",
    "steps_per_epoch": f"{_STAGE}.steps",
    "micro_batch": f"{_STAGE}.micro_batch_tokens",
    "accumulation": f"{_STAGE}.batch_tokens",
    "batch_rows": f"{_STAGE}.batch_tokens",
    # machine
    "bf16": "memory.compute_dtype",
    "fp16": "memory.compute_dtype",
    "precision": "memory.compute_dtype",
    "pure_bf16": "model.dtype",
    "checkpointing": "memory.activation_checkpointing",
    "no_checkpointing": "memory.activation_checkpointing",
    "activation_offload": "memory.activation_checkpointing",
    "tiled_mlp": "memory.tiled_mlp",
    "offload": "memory.offload_parameters",
    "deepspeed": "parallel.dp_shard, memory.offload_parameters",
    "fsdp": "parallel.dp_shard, memory.offload_parameters",
    "sharded": "parallel.dp_shard",
    "dp_shard": "parallel.dp_shard",
    "dp_replicate": "parallel.dp_replicate",
    "cp_ring": "parallel.cp_ring",
    "cp_ulysses": "parallel.cp_ulysses",
    "compile": "runtime.compile_blocks",
    "empty_cache": "runtime.empty_cache_every",
    "timeout": "parallel.timeout_seconds",
    "seed": "seed",
    "save_steps": "checkpoint.every_steps",
    "keep": "checkpoint.keep",
    "trackers": "tracking",
    "tensorboard": "tracking.tensorboard",
    "tracker_class": "tracking",
    "wandb": "tracking.wandb",
    "wandb_project": "tracking.wandb.project",
    "wandb_entity": "tracking.wandb.entity",
    "run_name": "tracking.wandb.name",
    # what is learnt
    "task": f"{_STAGE}.objective",
    "train_inputs": f"{_STAGE}.objective",
    "answers_only": f"{_STAGE}.objective",
    "loss_scale": f"{_STAGE}.objective, {_DATA}.*.conversations.train_turns",
    "last_turn": f"{_DATA}.*.conversations.train_turns",
    "pose": f"{_STAGE}.pose",
    "pose_target": f"{_STAGE}.pose.target_length",
    "pose_chunks": f"{_STAGE}.pose.chunks",
    # packing
    "packing": f"{_DATA}.*.pack.strategy, {_STAGE}.document_mask",
    "pack_strategy": f"{_DATA}.*.pack",
    "documents_apart": f"{_STAGE}.document_mask",
    "attention": f"{_STAGE}.document_mask",
    "split_texts": f"{_DATA}.*.pack.strategy",
    "too_long": f"{_DATA}.*.pack.overflow",
    "min_length": f"{_DATA}.*.pack.min_length",
    "group_by_length": f"{_DATA}.*.pack.group_by_length",
    "add_eos": f"{_DATA}.*.pack.specials",
    # data
    "template": f"{_DATA}.*.chat_template",
    "template_file": f"{_DATA}.*.chat_template",
    "data.path": f"{_DATA}.*.records or store",
    "data.names": f"{_DATA}.*.records or store",
    "data.texts": f"{_DATA}.*.records or store",
    "data.folder": f"{_DATA}.*.records",
    "data.files": f"{_DATA}.*.records",
    "data.component": f"{_DATA}.*.records or store",
    "data.type": f"{_DATA}.*.records or store",
    "data.subset": f"{_DATA}.*.store",
    "data.split": f"{_DATA}.*.store",
    "data.field": f"{_DATA}.*.store",
    "data.text_field": f"{_DATA}.*.store",
    "data.template": f"{_DATA}.*.chat_template",
    "data.template_file": f"{_DATA}.*.chat_template",
    "data.marks": f"{_DATA}.*.conversations.train_turns",
    "data.limit": f"{_DATA}.*.records",
    "data.weight": f"{_DATA}.*.weight",
    "data.weights": f"{_DATA}.*.weight",
}
"""Settings of a recipe that say what a key means."""
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {}, "none", "None", "null", "false")


class Found(NamedTuple):
    """A key of the file."""

    key: str
    item: int | None
    """Number of the item of a list that it is of."""
    value: Any

    @property
    def shown(self) -> str:
        """The key as people write it."""
        return self.key if self.item is None else self.key.replace("[]", f".{self.item}", 1)


class Note(NamedTuple):
    """What became of a key."""

    key: str
    value: Any
    kind: Literal["translated", "without effect", "not carried over", "left out there"]
    words: str
    """Where a recipe says it, or why not and what to do."""


class Meant:
    """What a file says, by meaning. Every key gets one note."""

    def __init__(self, values: Mapping[str, Any], table: KeyTable, *, where: str) -> None:
        self.table, self.where = table, where
        self.found: dict[str, list[Found]] = {}
        self._notes: dict[tuple[str, int | None], Note] = {}
        for key, item, value in flattened(values, table):
            self._enter(Found(key, item, value))

    def _enter(self, found: Found) -> None:
        meaning = self.table.meaning(found.key)
        if meaning is not None and not _is_empty(found.value):
            self.found.setdefault(meaning, []).append(found)
            return
        if meaning is not None:
            self.note(found, "without effect", "is empty, as if it were left out")
            return
        said = self.table.about(found.key)
        if said is None:
            near = f"{self.table.name} has no such key that longspan knows of; see {self.table.page}"
            self.note(found, "not carried over", near)
            return
        off = _is_off(found.value) or found.value in said.off or str(found.value) in map(str, said.off)
        unless = said.unless.get(str(found.value)) or (said.unless.get(found.key) if not off else None)
        if unless is not None:
            self.note(found, "not carried over", unless)
        elif said.kind == "without effect":
            self.note(found, "without effect", said.words)
        elif off:
            self.note(found, "without effect", "asks for nothing, as here")
        elif said.kind == "refused":
            raise ConfigError(
                f"{self.where}: {found.shown} cannot be translated: {said.words}",
                found=repr(found.value)[:100],
            )
        else:
            self.note(found, "not carried over", said.words)

    def note(self, found: Found, kind: Any, words: str) -> None:
        """Say what became of a key."""
        self._notes[found.key, found.item] = Note(found.shown, found.value, kind, words)

    def notes(self) -> list[Note]:
        """Return a note for every key; those that nothing asked for have no effect beside the others."""
        for each in (found for many in self.found.values() for found in many):
            if (each.key, each.item) not in self._notes:
                self.note(each, "without effect", "has no effect beside what else the file says")
        return list(self._notes.values())

    def given(self, meaning: str) -> bool:
        """Whether the file itself says it."""
        return meaning in self.found

    def take(self, meaning: str, place: str | None = None) -> Any:
        """Return what the file, else the tool by default, has for a meaning; None: nothing.

        Raises:
            ConfigError: two keys say different things.
        """
        found = self.found.get(meaning, [])
        place = MEANINGS[meaning] if place is None else place
        if not found:
            value = self.table.defaults.get(meaning)
            if value is not None:
                self.default(meaning, value, place)
            return value
        # One that is off beside one that is on asks for nothing, as in `gradient_checkpointing` beside that of FSDP.
        asking = [each for each in found if not _is_off(each.value)] or found
        for each in asking:
            if each.value != asking[0].value:
                raise ConfigError(
                    f"{self.where}: {asking[0].shown} and {each.shown} say different things of {place}",
                    found=f"{asking[0].value!r} and {each.value!r}",
                )
        for each in found:
            self.note(each, "translated", place)
        return asking[0].value

    def default(self, meaning: str, value: Any, place: str | None = None) -> None:
        """Say what the tool does where the file says nothing of a meaning."""
        name = next((key for key, means in self.table.translated.items() if means == meaning), None)
        if name is None:  # what the tool does whatever the file says; docs/coming-from-trainers.md says it
            return
        self._notes.setdefault((name, None), Note(name, value, "left out there", place or MEANINGS[meaning]))

    def leave(self, meaning: str, words: str) -> None:
        """Say that what the file says of a meaning is not carried over, and what to do."""
        for each in self.found.get(meaning, []):
            self.note(each, "not carried over", words)

    def idle(self, meanings: Sequence[str], why: str) -> None:
        """Say that these have no effect."""
        for each in (found for meaning in meanings for found in self.found.get(meaning, [])):
            self.note(each, "without effect", why)

    def number(self, meaning: str, place: str | None = None, *, endless: bool = False) -> float | None:
        """Return a number, with `endless` an infinite one too. Raises ConfigError where it is none."""
        value = self.take(meaning, place)
        return None if value is None else self.as_number(value, self._key(meaning), endless=endless)

    def as_number(self, value: Any, name: str, *, endless: bool = False) -> float:
        """Return a value as a number, as `number` does; `name`: what the error calls it."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) and not (endless and number == math.inf):
            raise ConfigError(f"{self.where}: {name} is no number", found=repr(value)[:100])
        return number

    def whole(self, meaning: str, place: str | None = None) -> int | None:
        """Return a whole number. Raises ConfigError where it is none."""
        number = self.number(meaning, place)
        if number is not None and not number.is_integer():
            raise ConfigError(f"{self.where}: {self._key(meaning)} is no whole number", found=number)
        return None if number is None else int(number)

    def steps(self, meaning: str, place: str | None = None) -> float | None:
        """Return so many steps, or a share of a run's below 1. Raises ConfigError where it is neither."""
        number = self.number(meaning, place)
        return number if number is None or number < 1 else int(number)

    def count(self, meaning: str, place: str | None = None) -> int | None:
        """Return a whole number of at least 1. Raises ConfigError where it is none."""
        number = self.whole(meaning, place)
        if number is not None and number < 1:
            raise ConfigError(f"{self.where}: {self._key(meaning)} is below 1", found=number)
        return number

    def flag(self, meaning: str, place: str | None = None) -> bool | None:
        """Return yes or no; a word such as `auto` is a yes. Raises ConfigError for lists and mappings."""
        value = self.take(meaning, place)
        if isinstance(value, (list, dict)):
            raise ConfigError(
                f"{self.where}: {self._key(meaning)} is neither true nor false", found=repr(value)[:100]
            )
        if isinstance(value, str):
            return value.lower() not in ("false", "no", "none", "0", "off")
        return None if value is None else bool(value)

    def text(self, meaning: str) -> str | None:
        """Return a text. Raises ConfigError for lists and mappings."""
        value = self.take(meaning)
        if isinstance(value, (list, dict)):
            raise ConfigError(f"{self.where}: {self._key(meaning)} is not one text", found=repr(value)[:100])
        return None if value is None else str(value)

    def texts(self, meaning: str) -> list[str]:
        """Return texts: a list, or one text with commas or spaces."""
        value = self.take(meaning)
        if value is None:
            return []
        if isinstance(value, (list, tuple)):
            return [str(each) for each in value]
        return [part for part in str(value).replace(",", " ").split() if part]

    def choice(self, meaning: str, *, otherwise: Any, do: str | None = None) -> Any:
        """Return our word for the tool's.

        Args:
            otherwise: what is taken for a word that the table does not have.
            do: what is then to be done; None: such a word is refused.

        Raises:
            ConfigError: a word that is refused.
        """
        value = self.take(meaning)
        words = self.table.values.get(meaning, {})
        if value is None:
            return otherwise
        key = str(value)
        if key in words:
            return words[key]
        if do is None:
            raise ConfigError(
                f"{self.where}: {self._key(meaning)} asks for what longspan does not train",
                found=repr(value),
                allowed=sorted(words),
            )
        self.leave(meaning, do)
        return otherwise

    def _key(self, meaning: str) -> str:
        found = self.found.get(meaning)
        return found[0].shown if found else meaning


def _is_empty(value: Any) -> bool:
    """Whether a value is as none at all."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _is_off(value: Any) -> bool:
    """Whether a value asks for nothing."""
    return any(type(value) is type(each) and value == each for each in _OFF) or value == 0.0 == value
