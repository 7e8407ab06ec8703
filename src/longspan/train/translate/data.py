"""The data of a config as the streams of a stage: where they are, how they are packed, and what of them is learnt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from longspan.core.errors import ConfigError
from longspan.train.translate.draft import RecipeDraft
from longspan.train.translate.meanings import MEANINGS, Found
from longspan.train.translate.sources import part_of, read_source

__all__ = ["Streams", "put_data"]

_RECORDS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")
_TEXTS = (".txt", ".md")
"""Of files that are one text each, which no stream reads as `records`."""
_BUILDERS = ("json", "csv", "text", "parquet", "arrow")
"""What `load_dataset` takes in place of a name, with files."""
_KNOWN_FIELDS = (None, "messages", "conversations", "trajectory", "text")
_MARKS = ("train", "training", "trainable", "loss", "learn", "weight")
PAIRS = "docs/coming-from-trainers.md#questions-and-answers-as-conversations"
"""Where it is said how records of instruction and output become conversations."""


class Streams(NamedTuple):
    """What a stage reads."""

    streams: dict[str, dict[str, Any]]
    objective: str
    apart: bool
    """Whether the documents of a row are kept apart."""
    shares: str | None


class _Dataset(NamedTuple):
    path: str
    kind: str
    """conversations, texts, or pairs of a question and an answer."""
    files: tuple[str, ...] = ()
    subset: str | None = None
    split: str | None = None
    field: str | None = None
    template: str | None = None
    limit: int | None = None
    weight: float | None = None


class _Rules(NamedTuple):
    """What holds for all data of a file."""

    pack: dict[str, dict[str, Any]]
    """By kind: `pack` of a stream."""
    template: str | None
    turns: str | None


def put_data(draft: RecipeDraft, task: str) -> Streams:
    """Return the streams of the stage, and say which commands have to be run before.

    Raises:
        ConfigError: data or a kind of training that cannot be.
    """
    meant = draft.meant
    task = meant.choice("task", otherwise=task)
    turns, learns_all = _learnt(draft)
    apart = _apart(draft, task)
    template = _template(draft)
    sets = _datasets(draft, "texts" if task == "lm" else "conversations")
    if not sets:
        draft.missing["stages.0.streams"] = "its data, such as '{data: {records: [chats.jsonl]}}'"
    kinds = {each.kind for each in sets}
    objective = "lm" if task == "lm" or learns_all or kinds == {"texts"} else "sft"
    rules = _Rules(_packing(draft, kinds), template, turns)
    streams: dict[str, dict[str, Any]] = {}
    weighted = any(each.weight is not None for each in sets)
    for each in sets:
        _add(draft, streams, each, rules, objective, alone=weighted)
    shares = "rows" if len(streams) > 1 and not weighted else None
    return Streams(streams, objective, apart, shares)


def _learnt(draft: RecipeDraft) -> tuple[str | None, bool]:
    """Return which turns are learnt, None: all answers, and whether the user's are, too."""
    meant = draft.meant
    turns = "last" if meant.flag("last_turn") else None
    scale = meant.choice(
        "loss_scale", otherwise="answers", do="every learnt token weighs the same here: answers are learnt"
    )
    if scale == "last":
        turns = "last"
    inputs = bool(meant.flag("train_inputs")) or scale == "all"
    if meant.flag("answers_only"):
        inputs = False
    return turns, inputs


def _template(draft: RecipeDraft) -> str | None:
    meant = draft.meant
    words = "the tokenizer's own template is taken; `chat_template` takes a shipped one (docs/inputs.md) or a file"
    template = meant.choice("template", otherwise=None, do=words)
    file = meant.text("template_file")
    if file is not None and (file.endswith((".jinja", ".j2")) or draft.at_hand(file) is not None):
        return file
    if file is not None:
        meant.leave("template_file", words)
    if template is not None:
        draft.remarks.append(
            f"chat template {meant.take('template')}: {template} of longspan, as published with the model; compare a "
            "conversation with `longspan data peek`"
        )
    return None if template is None else str(template)


def _apart(draft: RecipeDraft, task: str) -> bool:
    """Return whether documents of a row are kept apart there."""
    meant, facts = draft.meant, draft.meant.table.facts
    if task == "lm" and facts.get("packs_texts") and not meant.given("packing"):
        packing = True
        meant.default("packing", packing)
    else:
        packing = bool(meant.flag("packing"))
    apart = meant.flag("documents_apart")
    apart = True if apart is None else apart
    if packing and "flash_keeps_apart" in facts:
        apart = meant.take("pack_strategy") != "wrapped"
        if apart and "flash" not in (meant.text("attention") or ""):
            draft.remarks.append(
                "packed there without FlashAttention: the tool warns that samples may see each other; here they do not"
            )
    if not packing and meant.given("documents_apart") and "packs_texts" in facts and apart:
        packing = True  # neat_packing turns packing on
    if not packing:
        draft.remarks.append(
            "not packed there: a step has so many samples of any length. Here rows are packed with document masks, so "
            "it holds at least as many; `pack: {strategy: intact}` puts one sample in each row, at the cost of padding"
        )
        if meant.given("documents_apart") or meant.given("attention"):
            meant.idle(["documents_apart", "attention"], "rows are packed with document masks")
        return True
    if not apart:
        draft.remarks.append(
            "packed there without a document mask: the texts of a row see each other, and so they do with "
            "`document_mask: false` here. Leave that line out to keep them apart, which is better for fine-tuning"
        )
    return apart


def _packing(draft: RecipeDraft, kinds: set[str]) -> dict[str, dict[str, Any]]:
    """Return the `pack` of streams by kind."""
    meant, facts = draft.meant, draft.meant.table.facts
    chosen = None
    if meant.flag("packing"):
        chosen = meant.choice("pack_strategy", otherwise=None, do="rows are packed by best fit")
    else:
        meant.idle(["pack_strategy"], "packing is off")
    packs: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        strategy, overflow = chosen or facts["text_pack" if kind == "texts" else "pack"]
        if kind == "texts" and meant.flag("split_texts") is False:
            strategy, overflow = "best_fit", "drop_tail"
        if overflow is None or (kind != "texts" and chosen is None and meant.given("too_long")):
            words = "what is too long is left out, and counted"
            overflow = meant.choice("too_long", otherwise="drop", do=words)
        pack = {"strategy": strategy, "overflow": overflow}
        if kind == "texts":
            pack["specials"] = _specials(draft)
        if (shortest := meant.whole("min_length")) is not None and shortest > 1:
            pack["min_length"] = shortest
        if meant.flag("group_by_length"):
            pack["group_by_length"] = True
        packs[kind] = pack
    if "texts" not in kinds:
        meant.idle(["split_texts", "add_eos"], "there are no plain texts")
    return packs


def _specials(draft: RecipeDraft) -> str:
    """Return what frames a plain text."""
    meant = draft.meant
    specials = str(meant.table.facts["specials"])
    if meant.flag("add_eos") is False:
        specials = "bos"
    if specials == "both":
        model = draft.recipe.get("model", {}).get("path", "")
        # The one family of those that are widely trained whose tokenizer has no BOS.
        specials = "eos" if "qwen" in model.lower() else "both"
        draft.remarks.append(
            f"texts end with EOS there, and begin with BOS where the tokenizer has one: `specials: {specials}`; "
            "set eos for a tokenizer without BOS"
        )
    return specials


def _datasets(draft: RecipeDraft, usual: str) -> list[_Dataset]:
    """Return the data sets that the file names, in its order."""
    meant = draft.meant
    groups: dict[tuple[str, int | None], dict[str, Found]] = {}
    for meaning, many in meant.found.items():
        if meaning.startswith("data."):
            for each in many:
                root = (
                    each.key.partition("[")[0].partition(".")[0]
                    if each.item is not None or "." in each.key
                    else ""
                )
                groups.setdefault((root, each.item), {})[meaning.removeprefix("data.")] = each
    for group in groups.values():
        for name, each in group.items():
            meant.note(each, "translated", MEANINGS[f"data.{name}"])
    sets: list[_Dataset] = []
    for group in groups.values():
        values = {name: each.value for name, each in group.items()}
        if "names" in values:
            sets += _by_names(draft, values, usual)
        else:
            sets += _one(draft, group, values, usual)
    return sets


def _one(draft: RecipeDraft, group: dict[str, Found], values: dict[str, Any], usual: str) -> list[_Dataset]:
    """Return the data set of one item of a list, or of the keys of a file that has one."""
    meant = draft.meant
    component = values.get("component")
    kind = usual
    if component is not None:
        kind = _kind(draft, group["component"], "data.component", usual)
    elif "type" in values:
        kind = _kind(draft, group["type"], "data.type", usual)
    elif "texts" in values or "text_field" in values:
        kind = "texts" if "texts" in values or usual == "texts" else kind
    path = values.get("path", values.get("texts"))
    path = (
        str(path)
        if path is not None
        else str(component).rpartition(".")[2]
        if component is not None
        else None
    )
    if path is None:
        for each in group.values():
            meant.note(each, "without effect", "says nothing without a data set")
        return []
    marks = values.get("marks")
    if marks is not None and marks not in _MARKS:
        words = f"turns are marked by {', '.join(_MARKS)} here: rename the key, and set `train_turns: marked`"
        meant.note(group["marks"], "not carried over", words)
    files = values.get("files") or ()
    split = values.get("split")
    if split is not None and "[" in str(split):
        words = "a part of a split: choose records by `FILE[5000]` or `FILE[:5000]`"
        meant.note(group["split"], "not carried over", words)
        split = str(split).partition("[")[0]
    weight = values.get("weight")
    return [
        _Dataset(
            path=path,
            kind=kind,
            files=tuple(map(str, files if isinstance(files, list) else [files])) if files else (),
            subset=None if values.get("subset") is None else str(values["subset"]),
            split=None if split is None else str(split),
            field=values.get("field") or (values.get("text_field") if kind == "texts" else None),
            template=values.get("template_file") or _own_template(draft, group.get("template")),
            weight=None if weight is None else _share(draft, weight),
        )
    ]


def _own_template(draft: RecipeDraft, found: Found | None) -> str | None:
    if found is None:
        return None
    words = draft.meant.table.values.get("template", {})
    if str(found.value) not in words:
        draft.meant.note(
            found,
            "not carried over",
            "the tokenizer's own template is taken; see docs/inputs.md for shipped ones",
        )
    return words.get(str(found.value))


def _kind(draft: RecipeDraft, found: Found, meaning: str, usual: str) -> str:
    known = draft.meant.table.values[meaning]
    word = str(found.value)
    kind = known.get(word) or known.get(re.split(r"[.:]", word)[0])
    if kind is None:
        draft.meant.note(
            found,
            "not carried over",
            f"records of a form of their own: write them as conversations ({PAIRS})",
        )
        return "pairs"
    return str(kind)


def _share(draft: RecipeDraft, value: Any) -> float:
    share = draft.meant.as_number(value, "a share of the data")
    if share <= 0:
        raise ConfigError(f"{draft.meant.where}: a share of the data is a number above 0", found=repr(value))
    return share


def _by_names(draft: RecipeDraft, values: dict[str, Any], usual: str) -> list[_Dataset]:
    """Return data sets that are named in one key: of LLaMA-Factory by its own list, of ms-swift with `#500`."""
    names = values["names"] if isinstance(values["names"], list) else str(values["names"]).split(",")
    shares = values.get("weights")
    shares = shares if isinstance(shares, list) else str(shares).split(",") if shares is not None else []
    if shares and len(shares) != len(names):
        raise ConfigError(f"{draft.meant.where}: {len(names)} data sets have {len(shares)} shares")
    registered = draft.meant.table.facts.get("data") == "named"
    sets = []
    for number, name in enumerate(str(each).strip() for each in names):
        weight = _share(draft, shares[number]) if shares else None
        if registered:
            folder = str(values.get("folder") or "data")
            sets.append(
                _registered(draft, folder, name, usual)._replace(weight=weight, limit=values.get("limit"))
            )
            continue
        path, _, count = name.partition("#")
        path, _, subset = path.partition(":") if "://" not in path else (path, "", "")
        limit = int(count) if count.isdigit() else None
        sets.append(_Dataset(path, "conversations", subset=subset or None, limit=limit, weight=weight))
    return sets


def _registered(draft: RecipeDraft, folder: str, name: str, usual: str) -> _Dataset:
    """Return a data set that dataset_info.json of LLaMA-Factory describes, if it is at hand."""
    entry: dict[str, Any] = {}
    place = draft.at_hand(f"{folder}/dataset_info.json")
    if place is not None:
        entry = part_of(read_source(place, ()).values, name)
        if not entry:
            draft.remarks.append(f"{place} has no data set {name!r}")
    columns = part_of(entry, "columns")
    kind = (
        "texts" if usual == "texts" else "conversations" if entry.get("formatting") == "sharegpt" else "pairs"
    )
    field = columns.get("prompt", "text") if kind == "texts" else columns.get("messages", "conversations")
    if entry.get("hf_hub_url"):
        return _Dataset(
            entry["hf_hub_url"], kind, subset=entry.get("subset"), split=entry.get("split"), field=field
        )
    if not entry:
        draft.remarks.append(
            f"{name}: {folder}/dataset_info.json, which says what it is, is not at hand; taken for {folder}/{name}.json"
        )
    return _Dataset(
        f"{folder}/{entry.get('file_name', f'{name}.json')}", kind, field=field if entry else None
    )


def _add(
    draft: RecipeDraft,
    streams: dict[str, dict[str, Any]],
    data: _Dataset,
    rules: _Rules,
    objective: str,
    *,
    alone: bool,
) -> None:
    """Add a data set to the stream of its like, or as a stream."""
    origin, entries = _origin(draft, data, rules)
    stream: dict[str, Any] = {}
    template = data.template or rules.template
    if template is not None and origin == "records" and data.kind != "texts":
        stream["chat_template"] = template
    if rules.turns is not None and origin == "records" and data.kind != "texts":
        stream["conversations"] = {"train_turns": rules.turns}
    stream["pack"] = dict(rules.pack[data.kind])
    if data.kind == "texts" and objective == "sft":
        stream["loss_mask"] = False
    if data.weight is not None:
        stream["weight"] = data.weight
    for each in streams.values():
        if (
            not alone
            and {name: value for name, value in each.items() if name not in ("records", "store")} == stream
            and origin in each
        ):
            each[origin] = [*each[origin], *entries]
            return
    label = Path(data.files[0] if data.files else data.path.rstrip("/")).name
    label = Path(label).stem if _is_file(label) else label
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "data"
    name, number = base, len(streams)
    while name in streams:
        number += 1
        name = f"{base}-{number}"
    streams[name] = {origin: entries, **stream}


def _origin(draft: RecipeDraft, data: _Dataset, rules: _Rules) -> tuple[str, list[str]]:
    """Return `records` with files that are read as they are, or `store` with what a command makes first."""
    limit = "" if data.limit is None else f"[{data.limit}]"
    name = Path(data.path.rstrip("/")).name or "data"
    files = list(data.files) if data.files else [data.path] if _is_file(data.path) else []
    if data.kind == "pairs":
        source = ", ".join(files) or data.path
        written = f"{Path(files[0]).with_suffix('').as_posix() if files else name}-messages.jsonl"
        draft.remarks.append(
            f"{source}: questions and answers have to be written as conversations, to {written}: {PAIRS}"
        )
        return "records", [written + limit]
    if files and all(_is_file(each, _RECORDS) for each in files) and data.field in _KNOWN_FIELDS:
        return "records", [each + limit for each in files]
    where = _address(draft, data, files)
    options = (
        f"--text-field {data.field}" if data.kind == "texts" and data.field not in (None, "text") else ""
    )
    if data.kind == "conversations":
        options = f"--messages-field {data.field or 'messages'}"
        template = data.template or rules.template
        options += f" --chat-template {template}" if template else ""
        options += f" --conversations train_turns={rules.turns}" if rules.turns else ""
    if "data.columns" in draft.meant.table.facts.get("unknown", ()) and data.field is None:
        draft.remarks.append(
            f"{data.path}: taken for conversations in `messages`; for plain texts leave out --messages-field"
        )
    model = draft.recipe.get("model", {}).get("path", "MODEL")
    store = f"stores/{name}"
    words = ["longspan data tokenize", where, f"--tokenizer {model}", options, f"--out {store}"]
    draft.before.append(" ".join(word for word in words if word))
    if limit:
        draft.remarks.append(
            f"{data.path}: {data.limit} samples are asked for; the store has all, `mixture: {{tokens: N}}` takes fewer"
        )
    return "store", [store]


def _is_file(path: str, endings: tuple[str, ...] = _RECORDS + _TEXTS) -> bool:
    name = path.lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2")
    return name.endswith(endings) and "://" not in path and "*" not in path


def _address(draft: RecipeDraft, data: _Dataset, files: list[str]) -> str:
    """Return what `longspan data tokenize` reads: a path, or an address on the hub."""
    path = data.path
    if path in _BUILDERS and files:
        return " ".join(files)
    if "://" in path or path.startswith(("/", ".", "~")) or draft.at_hand(path) is not None or _is_file(path):
        return " ".join(files) or path
    if "/" not in path:
        draft.remarks.append(
            f"{path}: give the owner too, hf://OWNER/{path}; here a data set of the hub has both names"
        )
        path = f"OWNER/{path}"
    inside = data.subset or (data.split if data.split not in (None, "train") else None)
    if data.subset and data.split not in (None, "train"):
        draft.remarks.append(
            f"{path}: the split {data.split} of {data.subset} is not in the address: name its files"
        )
    return f"hf://{path}/{files[0] if files else inside}" if files or inside else f"hf://{path}"
