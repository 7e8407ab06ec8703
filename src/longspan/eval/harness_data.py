"""lm-eval's tasks on files that lie here: no hub, no network.

    load_tasks(["longbench", "mmlu_anatomy"], data_root="evaluation")

Where lm-eval would fetch `Xnhyacinth/LongBench`, configuration `narrativeqa`, split `test`, this reads the
first that exists of (a folder is called like the data set, with or without its owner, in any case)

    evaluation/LongBench/narrativeqa/test*.parquet      as hub data sets are stored, shards in order
    evaluation/LongBench/data/narrativeqa/test*.parquet and so on with .jsonl and .json
    evaluation/LongBench/narrativeqa.jsonl              one file a configuration, for the split that is tested
    evaluation/LongBench/data/narrativeqa.jsonl         as the release's archive has it

Only the folders of the named families are searched for tasks, because lm-eval has 14,000 of them. Needs the
extra `harness`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from longspan.core.errors import ArgumentError, DataError, MissingDependencyError
from longspan.eval.released.rows import Rows

FAMILIES = {
    "longbench": "longbench",
    "longbench2": "longbench2",
    "infinitebench": "infinitebench",
    "babilong": "babilong",
    "mmlu": "mmlu/default",
    "mmlu_continuation": "mmlu/continuation",
}
"""Name of a family of tasks and lm-eval's folder of it."""
NO_CHAT_TEMPLATE = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""LongBench's few-shot and code tasks: the benchmark asks them without a chat template."""
READERS = ("json", "parquet", "csv", "arrow")
"""Where a task names one of these as its data set, it has files of its own."""
_SUFFIXES = (".parquet", ".jsonl", ".json")
_DEFAULT_SPLIT = "test"


def load_tasks(
    names: Sequence[str],
    *,
    data_root: str | Path | None,
    num_fewshot: int | None = None,
    max_seq_lengths: str | None = None,
    include_path: str | Path | None = None,
) -> dict[str, ConfigurableTask]:
    """Load lm-eval's tasks by name, in lm-eval's order; groups and tags stand for all their tasks.

    Args:
        data_root: folder of the data sets; None: lm-eval fetches them itself.
        num_fewshot: examples in front of each question. None: as the task has it.
        max_seq_lengths: BABILong's configuration, `0k` or `128k` say.
        include_path: a folder with further task definitions, which may be named too.

    Raises:
        ArgumentError: no such task.
        DataError: data that is not there; the message says which files are looked for.
            Or data that could not be fetched.
        MissingDependencyError: a package that the family's own scoring needs.
    """
    manager = _manager(names, include_path)
    metadata = {} if max_seq_lengths is None else {"max_seq_lengths": max_seq_lengths}
    members = []
    for name in dict.fromkeys(leaf for group in names for leaf in _leaves(group, manager)):
        member: dict[str, Any] = {"task": name}
        if num_fewshot is not None:
            member["num_fewshot"] = num_fewshot
        config = {**_config(manager, name), **member}
        if data_root is not None and config.get("dataset_path") not in READERS:
            # A partial, because lm-eval copies its configurations.
            member["custom_dataset"] = functools.partial(read_dataset, Path(data_root), config, metadata)
        members.append(member)
    try:
        return manager.load({"group": "longspan", "task": members})["tasks"]
    except ImportError as error:
        raise MissingDependencyError(
            f"{', '.join(names)} of lm-eval needs further packages",
            found=str(error).splitlines()[0],
            fix="pip install 'longspan[harness]'",
        ) from None
    except (
        OSError
    ) as error:  # what `datasets` raises without a network, and for data sets that it does not find
        raise DataError(
            f"the data of {', '.join(names)} could not be loaded",
            found=str(error).splitlines()[0],
            fix="put the files into a folder and name it with --data-root",
        ) from None


def family_of(name: str) -> tuple[str, str]:
    """Return family and subtask of a task: (mmlu, anatomy) of mmlu_anatomy; (name, "") of one of no family.

    lm-eval writes the form of MMLU's tasks behind the subject: mmlu_anatomy_continuation is of `mmlu_continuation`.
    """
    if name.startswith("mmlu_") and name.endswith("_continuation"):
        name = f"mmlu_continuation_{name[len('mmlu_') : -len('_continuation')]}"
    for family in sorted(FAMILIES, key=len, reverse=True):
        if name == family or name.startswith(f"{family}_"):
            return family, name[len(family) + 1 :]
    return name, ""


def takes_chat_template(name: str) -> bool:
    """Return whether the benchmark asks the task as a chat where a chat is asked for."""
    family, subtask = family_of(name)
    return not (family == "longbench" and subtask.removesuffix("_e") in NO_CHAT_TEMPLATE)


def read_dataset(
    root: Path, config: Mapping[str, Any], metadata: Mapping[str, Any], /, **settings: Any
) -> dict[str, Any]:
    """Return a task's data set: what lm-eval would have loaded, by split.

    Raises:
        DataError: the split that is tested is not there, or few-shot examples are wanted and theirs is not.
    """
    import datasets

    names = config.get("dataset_path"), config.get("dataset_name")
    if config.get("dataset_kwargs", {}).get("qa_split"):  # BABILong chooses its configuration by a length
        names = names[0], metadata.get("max_seq_lengths") or "0k"
    path, part = str(names[0]), names[1]
    tested = config.get("test_split") or config.get("validation_split") or _DEFAULT_SPLIT
    found = {}
    for split in {config.get(f"{kind}_split") for kind in ("test", "validation", "training", "fewshot")}:
        if split is None:
            continue
        files = find_files(root, path, part, split, alone=split == tested)
        needed = split == tested or (split == config.get("fewshot_split") and config.get("num_fewshot"))
        if files:
            found[split] = datasets.Dataset.from_list(
                _same_kinds([_with_question(row) for file in files for row in Rows(file)])
            )
        elif needed:
            raise DataError(
                f"the data of {config['task']} is not there",
                found=f"no file of {path}, {part or 'default'}, split {split} under {root}",
                allowed=[str(place) for place in expected_places(root, path, part, split)],
                fix="put the files of the data set there, or name another folder with --data-root",
            )
        else:
            found[split] = datasets.Dataset.from_list([])
    return found


def expected_places(root: Path, path: str, part: str | None, split: str) -> list[Path]:
    """Return where a split is looked for first, to tell people."""
    folder = root / path.rsplit("/", 1)[-1]
    if part is None:
        return [folder / f"{split}.jsonl", folder / f"{split}*.parquet"]
    return [folder / part / f"{split}*.parquet", folder / f"{part}.jsonl"]


def find_files(root: Path, path: str, part: str | None, split: str, *, alone: bool) -> list[Path]:
    """Return the files of a split, in order; none: []. `alone`: a file without a split's name may be it."""
    owner, _, name = path.rpartition("/")
    folders = [each for each in (root / owner / name, *_children(root, name)) if each.is_dir()]
    folders += [each / "data" for each in folders if (each / "data").is_dir()]
    splits = [split, f"{split}g"] if split.endswith("_en") else [split]  # InfiniteBench's files say _eng
    for folder in folders:
        places = [(folder, split_name) for split_name in splits] if part is None else [(folder / part, split)]
        for place, stem in places:
            for suffix in _SUFFIXES:
                files = [place / f"{stem}{suffix}", *sorted(place.glob(f"{stem}-*{suffix}"))]
                files = [file for file in files if file.is_file()]
                if files:
                    return files
        if part is not None and alone:
            files = [folder / f"{part}{suffix}" for suffix in _SUFFIXES]
            files = [file for file in files if file.is_file()]
            if files:
                return files[:1]
    return []


def _children(root: Path, name: str) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder", fix="name the folder of the data sets with --data-root")
    return sorted(each for each in root.iterdir() if each.name.casefold() == name.casefold())


def _with_question(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of LongBench with its question by the name of lm-eval's copy too; the release says `input`."""
    longbench = {"input", "context", "answers"} <= row.keys()
    return {**row, "question": row["input"]} if longbench and "question" not in row else row


def _same_kinds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make a column that holds lists here and single values there a column of lists of texts."""
    mixed = [
        name
        for name in {name for row in rows for name in row}
        if len({isinstance(row.get(name), list) for row in rows if row.get(name) is not None}) > 1
    ]
    for row in rows:
        for name in mixed:
            value = row.get(name)
            if value is not None:
                row[name] = [str(each) for each in value] if isinstance(value, list) else [str(value)]
    return rows


def _manager(names: Sequence[str], include_path: str | Path | None) -> TaskManager:
    here = Path(lm_eval.tasks.__file__).parent
    families = {family_of(name)[0] for name in names} & FAMILIES.keys()
    folders = [here / FAMILIES[family] for family in sorted(families)]
    if include_path is not None:
        folders.append(Path(include_path))
    manager = TaskManager(include_defaults=False, include_path=folders)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ArgumentError(
            "there is no such task",
            found=", ".join(unknown),
            allowed=f"{', '.join(FAMILIES)}, or one of their tasks, such as longbench_qasper or mmlu_anatomy",
            fix="give the folder of other lm-eval tasks with --include-path",
        )
    return manager


def _leaves(name: str, manager: TaskManager) -> list[str]:
    """Return the single tasks that a name stands for."""
    entry = manager.task_index[name]
    kind = entry.kind.name
    if kind == "TAG":
        return [leaf for child in sorted(entry.tags) for leaf in _leaves(child, manager)]
    if kind != "GROUP":
        return [name]
    children = _config(manager, name)["task"]
    named: list[str] = []
    for child in children:
        inside = child if isinstance(child, str) else child.get("task", child.get("group"))
        named += [inside] if isinstance(inside, str) else inside
    return [leaf for child in named for leaf in _leaves(child, manager)]


def _config(manager: TaskManager, name: str) -> dict[str, Any]:
    """Return a task's or group's settings as its file has them, functions by their names."""
    return manager.task_index[name].cfg or {}
