"""Evaluation records: a header line, one line a sample, a footer line when nothing is missing.

    {"kind": "header", "task": "needle", "label": "before", "fingerprint": "6a5f...", "model": {...},
     "format": 2, "title": "One fact is ...", "axes": {"columns": "length", "rows": "depth"}, ...}
    {"kind": "sample", "id": "0c11...", "length": 2048, "depth": 0.5, "score": 1.0, "unscored": null, ...}
    {"kind": "footer", "samples": 150}

Samples are identified by everything that determines their output, so a killed evaluation goes on with the
samples that are missing, and one with other settings refuses to write into the same file.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.core.files import atomic_write, sha256_bytes
from longspan.core.records import JsonlWriter, read_jsonl
from longspan.eval.registry import entry_of

MODEL_KEYS = ("path", "fingerprint", "rope", "trained_length")
_PACKAGES = ("longspan", "torch", "transformers")
_SHOWN = 60
_HEADER_BEGINS = b'{"kind": "header"'
HEADER_FORMAT = 2
"""Since 2 a header says of the task what a report needs: title, axes, ... (`TaskEntry.described`)."""
_DESCRIBES = ("format", "title", "heading", "short", "axes", "higher_is_better", "cluster")
# A remark, what a command was told, the date, the versions and how a report shows it do not make it another evaluation.
_NOT_IDENTITY = ("kind", "fingerprint", "note", "settings", "versions", "created", *_DESCRIBES)


class EvalRecords(NamedTuple):
    """A records file as read."""

    header: dict[str, Any]
    samples: list[dict[str, Any]]
    complete: bool
    """Whether the footer is there and counts these samples."""


def make_header(
    task: str,
    label: str,
    *,
    model_info: Mapping[str, Any],
    tokenizer: str,
    seed: int,
    params: Mapping[str, Any],
    note: str | None = None,
    used: Mapping[str, Any] | None = None,
    higher_is_better: bool | None = None,
) -> dict[str, Any]:
    """Return the header of an evaluation; `fingerprint` covers all that determines the outputs.

    `model_info` holds path, fingerprint, rope (the parameters in effect) and trained_length; `note` is a
    remark for readers, `used` the settings of the command that asked; `higher_is_better` is that of the scorer, None
    where the task says it.

    Raises:
        ArgumentError: a key of `model_info` is missing.
    """
    missing = [key for key in MODEL_KEYS if key not in model_info]
    if missing:
        raise ArgumentError(f"model_info lacks {', '.join(missing)}", allowed=MODEL_KEYS)
    header: dict[str, Any] = {
        "kind": "header",
        "task": task,
        "label": label,
        "model": dict(model_info),
        "tokenizer": tokenizer,
        "seed": seed,
        "params": dict(params),
    }
    header = json.loads(json.dumps(header))  # tuples become lists, as they will when read back
    header["fingerprint"] = header_fingerprint(header)
    entry = entry_of(task)
    header |= {"format": HEADER_FORMAT, **(entry.described() if entry else {})}
    if higher_is_better is not None:
        header["higher_is_better"] = higher_is_better
    header["note"] = note
    header["settings"] = None if used is None else dict(used)
    header["versions"] = {name: importlib.metadata.version(name) for name in _PACKAGES}
    header["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return header


def header_fingerprint(header: Mapping[str, Any]) -> str:
    """Return 16 hex characters that change when anything but the note, the versions and the date changes."""
    identity = {key: value for key, value in header.items() if key not in _NOT_IDENTITY}
    # The folder may be moved between two runs; the fingerprint of the weights says which model it is.
    identity["model"] = {key: value for key, value in header["model"].items() if key != "path"}
    return _digest(identity)


def sample_id(header: Mapping[str, Any], *parts: object) -> str:
    """Return 16 hex characters that identify one sample of the evaluation that `header` describes."""
    return _digest([header["fingerprint"], *parts])


def read_records(path: str | Path) -> EvalRecords:
    """Read a records file, finished or growing; a torn last line is not a record.

    Raises:
        DataError: the file is missing, broken, or does not begin with a header.
    """
    records = list(read_jsonl(path))
    if not records or records[0].get("kind") != "header" or "fingerprint" not in records[0]:
        raise DataError(f"{path} is not an evaluation records file", found="no header in its first line")
    samples = [record for record in records if record.get("kind") == "sample"]
    for number, record in enumerate(samples, 1):
        if "id" not in record:
            raise DataError(f"{path}: sample {number} has no id", fix="remove the file and evaluate again")
    footer = records[-1] if records[-1].get("kind") == "footer" else None
    return EvalRecords(records[0], samples, footer is not None and footer.get("samples") == len(samples))


class RecordsWriter:
    """Write the samples of one evaluation, going on with a file that the same evaluation began.

        with RecordsWriter(path, header) as writer:
            for sample in missing(writer.recorded):
                writer.write({"kind": "sample", "id": ..., ...})
            writer.finish()

    `recorded` holds what earlier runs wrote, by id. With `retry_unscored` samples without a score are taken
    out of the file, which is replaced as a whole, and so are missing again.

    Raises:
        ConfigError: the file belongs to an evaluation with other settings; the message names them.
        DataError: the file is something else.
        RunError: another process writes the file.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any], *, retry_unscored: bool = False) -> None:
        self.path = Path(path)
        self.complete = False
        self.recorded: dict[str, dict[str, Any]] = {}
        _refuse_other_files(self.path)
        self._file = JsonlWriter(self.path, alone=True)
        try:
            self._go_on(header, retry_unscored=retry_unscored)
        except BaseException:
            self._file.close()
            raise

    def _go_on(self, header: Mapping[str, Any], *, retry_unscored: bool) -> None:
        """Read what earlier runs wrote, or begin the file."""
        if not any(read_jsonl(self.path)):
            self._file.write(dict(header))
            return
        found = read_records(self.path)
        _check_same_evaluation(self.path, found.header, header)
        if retry_unscored:
            kept = _without_unscored(self.path, found)
            if kept is not found:  # another file stands there now
                self._file.close()
                self._file = JsonlWriter(self.path, alone=True)
            found = kept
        self.recorded = {record["id"]: record for record in found.samples}
        self.complete = found.complete

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one sample."""
        self._file.write(dict(record))
        self.recorded[record["id"]] = dict(record)
        self.complete = False

    def finish(self, said: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Write the footer, which says that nothing is missing, and why fewer samples than planned are enough."""
        if not self.complete:
            self._file.write({"kind": "footer", "samples": len(self.recorded), **said})
            self.complete = True

    def __enter__(self) -> RecordsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _refuse_other_files(path: Path) -> None:
    """Raise DataError for a file that is not a records file, before its last line is taken for a torn one."""
    if not path.exists():
        return
    first = next(read_jsonl(path), None)
    if first is None:
        with open(path, "rb") as file:
            ours = _HEADER_BEGINS.startswith(file.read(len(_HEADER_BEGINS)))
    else:
        ours = first.get("kind") == "header"
    if not ours:
        raise DataError(f"{path} is not an evaluation records file", found="no header in its first line")


def _without_unscored(path: Path, found: EvalRecords) -> EvalRecords:
    """Take the samples without a score, and the footer with them, out of a file."""
    kept = [record for record in found.samples if record.get("unscored") is None]
    if len(kept) == len(found.samples):
        return found
    with atomic_write(path, "w") as file:
        for record in (found.header, *kept):
            file.write(json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n")
    return EvalRecords(found.header, kept, False)


def _check_same_evaluation(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if found["fingerprint"] == wanted["fingerprint"]:
        return
    # As the fingerprint reads them: null is not absent, 1 is not 1.0, {} is not nothing.
    old, new = ({key: json.dumps(value) for key, value in _flat(each).items()} for each in (found, wanted))
    ignored = {*_NOT_IDENTITY, "model.path"}
    differing = [
        f"{key} ({_both(old.get(key), new.get(key))})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[0] not in ignored and key not in ignored
    ]
    raise ConfigError(
        f"{path} holds an evaluation with other settings",
        found="; ".join(differing) or "a header that was changed after it was written",
        fix="choose another file or label, or remove this file to evaluate from the start",
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {
            key: item
            for name, child in value.items()
            for key, item in _flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
        }
    return {prefix: value}


def _both(old: str | None, new: str | None) -> str:
    """Write two values, long ones from where they begin to differ."""
    pairs = enumerate(zip(old or "", new or ""))
    same = next((place for place, (one, two) in pairs if one != two), 0)
    return ", ".join(
        f"{name}: {'absent' if value is None else _short(value, same)}"
        for name, value in (("file", old), ("now", new))
    )


def _short(text: str, same: int) -> str:
    if len(text) <= _SHOWN:
        return text
    start = max(0, min(same - _SHOWN // 3, len(text) - _SHOWN))
    end = start + _SHOWN
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")


def _digest(value: object) -> str:
    return sha256_bytes(json.dumps(value, sort_keys=True).encode())[:16]
