"""The evaluation tasks: what records call them, what they ask, and along which fields a report lays them out.

A task of your own is one file and one entry:

    from longspan.eval.registry import Axes, TaskEntry, register

    register(TaskEntry("kv_retrieval", "A value is asked for by its key.", config="mine:KvConfig", task="mine:Kv",
                       axes=Axes(rows="depth", columns="length"), scorers=("contains",)))

`task` is a class as `eval.task.Task` describes it, with a classmethod `from_config(config, data, form)`. An installed
package registers without a call: an entry point of the group `longspan.tasks` whose object is the `TaskEntry`.

Places are texts, "module:Class", and read when they are needed: this module is light to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from longspan.core.errors import ArgumentError

ENTRY_POINTS = "longspan.tasks"
_FIELDS = frozenset(("kind", "id", "output", "expected", "score", "unscored", "seconds", "cost"))


class Axes(NamedTuple):
    """Fields of a sample that a grid of scores is laid out by."""

    columns: str = "length"
    """Usually the context length in tokens, by which there is an effective context."""
    rows: str | None = None
    """None: the columns alone."""


class TaskEntry(NamedTuple):
    """One evaluation task; the header of its records says all but the places."""

    name: str
    """As in the records: `Task.name`."""
    title: str
    """What is asked, in one sentence."""
    config: str = ""
    """Its settings, a `core.config.Config`: "module:Class". Empty: its command has options of its own."""
    task: str = ""
    """The task, "module:Class"; `eval.task.FromConfig` says how it is made."""
    axes: Axes | None = None
    """None: a table of scores by data set and metric."""
    scorers: tuple[str, ...] = ()
    """Names of `eval.scorers`, the usual one first."""
    cluster: str = ""
    """The field of a sample that names the text which it shares with others; empty: each has its own."""
    higher_is_better: bool = True
    """Of the score; where a scorer gives it, the scorer says so."""
    heading: str = ""
    """Over its section of a report; empty: the name with a capital."""
    short: str = ""
    """Where room is short, in a table's head say; empty: the name."""
    command: str = ""
    """How `longspan eval` runs it, such as `needle --multi-key`; empty: its name."""
    data: str = ""
    """What `--data` names, for the help; empty: it reads no files."""
    reads: tuple[str, ...] = ("paths", "text_field", "source_field")
    """Fields of `held_out.TaskDataConfig` that it goes by, where it reads files."""
    examples: tuple[str, ...] = ("",)
    """Options of its command that can be run as they are, beside model and run folder."""

    def described(self) -> dict[str, Any]:
        """Return what the header of the records says of the task, so that a report needs no registry."""
        words = self.name.replace("_", " ")
        short = self.short or words
        return {
            "title": self.title,
            "heading": self.heading or short[:1].upper() + short[1:],
            "short": short,
            "axes": None if self.axes is None else self.axes._asdict(),
            "higher_is_better": self.higher_is_better,
            "cluster": self.cluster,
        }


_GRID = Axes(rows="depth", columns="length")
_NEEDLE = TaskEntry(
    "needle",
    "One fact is hidden at a given depth of a long context, then asked for.",
    config="longspan.eval.needle_config:NeedleConfig",
    task="longspan.eval.needle:NeedleTask",
    axes=_GRID,
    scorers=("teacher_forced", "contains", "string_match_all"),
    heading="Needle in a haystack",
    cluster="sample",
    data="Haystack: files, folders, patterns; many times. Default: Python's reference prose.",
)
_TOPICS = TaskEntry(
    "topics",
    "Several topics are talked about one after the other, then one is asked for.",
    config="longspan.eval.topics:TopicsConfig",
    task="longspan.eval.topics:Topics",
    axes=Axes(columns="num_topics"),
    scorers=("contains",),
    examples=("--counts 2,3 --samples 1", "--kind lines --counts 4 --samples 1 --questions 2"),
)
_BUILT_IN = (
    _NEEDLE,
    _NEEDLE._replace(
        name="needle_distractors",
        title="Other facts of the same form stand in the same context. Finding the only fact of its kind is easier "
        "than finding the one asked for.",
        heading="Needle with distractors",
        short="distractors",
        command="needle --num-distractors",
    ),
    _NEEDLE._replace(
        name="needle_multi",
        title="Several facts are hidden in one context, and all are asked for.",
        heading="Several needles",
        short="several needles",
        command="needle --num-needles",
    ),
    _NEEDLE._replace(
        name="needle_multikey",
        title="One context holds a fact with its own key at every depth, and each is asked for. "
        "It is harder than a single needle.",
        task="longspan.eval.needle_multikey:MultiKeyTask",
        heading="Needles with keys at every depth",
        short="multi-key",
        command="needle --multi-key",
    ),
    TaskEntry(
        "passkey",
        "A number is hidden in repeated filler text, then asked for.",
        config="longspan.eval.passkey:PasskeyConfig",
        task="longspan.eval.passkey:Passkey",
        axes=_GRID,
        scorers=("first_number",),
        examples=("--lengths 512,640 --depths 0,1 --samples 1",),
    ),
    TaskEntry(
        "tool_calls",
        "In the long log of an agent, the call that was made at one step and what it returned, word for word.",
        config="longspan.eval.tool_calls:ToolCallsConfig",
        task="longspan.eval.tool_calls:ToolCalls",
        axes=_GRID,
        scorers=("call_match",),
        heading="Calls in long histories",
        short="tool calls",
        examples=("--lengths 700 --depths 0,1 --samples 1",),
    ),
    TaskEntry(
        "ruler",
        "RULER's 13 subtasks: needles of many kinds, variable tracking, frequent words, questions among documents.",
        config="longspan.eval.ruler.task:RulerConfig",
        task="longspan.eval.ruler.task:Ruler",
        axes=Axes(rows="subtask", columns="length"),
        scorers=("string_match_all", "string_match_part"),
        heading="RULER",
        short="RULER",
        data="Essays: files, folders, patterns; many times. Default: Python's reference prose.",
        reads=("paths", "questions", "cache"),
        examples=(
            "--lengths 2k --subtasks niah_single_1,niah_multikey_2,vt --samples 1 --sample-cache cache",
        ),
    ),
    TaskEntry(
        "ruler_v2",
        "RULERv2's 12 tasks: keys, several values and questions, each at four levels from copying to solving.",
        config="longspan.eval.released.ruler_v2:RulerV2Config",
        task="longspan.eval.released.ruler_v2:RulerV2",
        axes=Axes(rows="subtask", columns="length"),
        scorers=("ruler_v2",),
        heading="RULERv2",
        short="RULERv2",
        data="Folders of `ns prepare_data ruler2`, mk_niah_basic/test.jsonl and so on; many times.",
        reads=("paths", "strict"),
        examples=("--data ruler2 --lengths 128,256,512 --max-new-tokens 8",),
    ),
    _TOPICS,
    _TOPICS._replace(
        name="lines",
        title="Many lines hold a number each, then that of one line is asked for.",
        axes=Axes(columns="num_lines"),
        scorers=("first_number",),
        command="topics --kind lines",
    ),
    TaskEntry(
        "ppl",
        "Perplexity of unseen text by context length and position.",
        higher_is_better=False,
        heading="Perplexity",
    ),
    TaskEntry(
        "longqa",
        "Questions on documents from JSON lines, as LongBench asks and scores them.",
        config="longspan.eval.longqa:LongQaConfig",
        task="longspan.eval.longqa:LongQa",
        scorers=("by_metric",),
        heading="Long question answering",
        data="JSON lines as LongBench's; many times.",
        reads=("paths", "strict"),
        examples=("--data questions.jsonl --samples 2",),
    ),
    TaskEntry(
        "mrcr",
        "In a long conversation the same was asked for 2, 4 or 8 times; one of the answers is wanted, word for word.",
        config="longspan.eval.released.mrcr:MrcrConfig",
        task="longspan.eval.released.mrcr:Mrcr",
        axes=Axes(rows="num_needles", columns="length"),
        scorers=("mrcr_ratio",),
        heading="MRCR",
        short="MRCR",
        data="Rows of openai/mrcr: files or folders; many times.",
        reads=("paths", "strict"),
        examples=("--data mrcr.jsonl --lengths 128,256,512 --max-new-tokens 16",),
    ),
    TaskEntry(
        "graphwalks",
        "In a long list of edges, the nodes that a walk reaches or the parents of one.",
        config="longspan.eval.released.graphwalks:GraphWalksConfig",
        task="longspan.eval.released.graphwalks:GraphWalks",
        axes=Axes(rows="problem_type", columns="length"),
        scorers=("graphwalks_f1",),
        heading="GraphWalks",
        short="GraphWalks",
        data="Rows of openai/graphwalks: files or folders; many times.",
        reads=("paths", "strict"),
        examples=("--data graphwalks.jsonl --lengths 128,256,512 --max-new-tokens 16",),
    ),
    TaskEntry(
        "nolima",
        "A fact in a book is asked for that shares no word with its question: what links them is to be inferred.",
        config="longspan.eval.released.nolima:NolimaConfig",
        task="longspan.eval.released.nolima:Nolima",
        axes=Axes(rows="question_type", columns="length"),
        scorers=("contains_exactly", "last_line_contains", "exact_match"),
        heading="NoLiMa",
        cluster="haystack",
        short="NoLiMa",
        data="Needle set and books of amodaresi/NoLiMa: files or folders; many times.",
        reads=("paths",),
        examples=("--data nolima --lengths 250 --num-depths 2 --max-new-tokens 8",),
    ),
    TaskEntry(
        "babilong",
        "The facts of a short story stand among the sentences of books, then a question on them is asked.",
        config="longspan.eval.released.babilong:BabilongConfig",
        task="longspan.eval.released.babilong:Babilong",
        axes=Axes(rows="subtask", columns="length"),
        scorers=("babilong",),
        heading="BABILong",
        short="BABILong",
        data="Rows of RMT-team/babilong: folders with data/qa1/4k.json; many times.",
        reads=("paths", "strict"),
        examples=("--data babilong --lengths 1k --max-new-tokens 8",),
    ),
    TaskEntry(
        "longbench_v2",
        "Questions of four choices on documents of up to two million words, which take reasoning.",
        config="longspan.eval.released.longbench_v2:LongBenchV2Config",
        task="longspan.eval.released.longbench_v2:LongBenchV2",
        axes=Axes(rows="difficulty", columns="size"),
        scorers=("longbench_v2",),
        heading="LongBench v2",
        short="LongBench v2",
        data="Rows of THUDM/LongBench-v2: files or folders; many times.",
        reads=("paths", "strict"),
        examples=("--data longbench-v2.json --max-length 512 --max-new-tokens 8",),
    ),
    TaskEntry(
        "lveval",
        "Questions on texts of five lengths in two languages, among confusing facts, with replaced names.",
        config="longspan.eval.released.lveval:LvEvalConfig",
        task="longspan.eval.released.lveval:LvEval",
        axes=Axes(rows="subtask", columns="length"),
        scorers=("by_metric",),
        heading="LV-Eval",
        short="LV-Eval",
        data="Rows of infini-ai/LVEval: folders with hotpotwikiqa_mixup_16k.jsonl; many times.",
        reads=("paths", "strict"),
        examples=("--data lveval --lengths 16 --max-length 512 --max-new-tokens 8",),
    ),
    TaskEntry(
        "longproc",
        "Procedures are written out over thousands of tokens: searches, routes, beliefs, tables, programs.",
        config="longspan.eval.released.longproc:LongProcConfig",
        task="longspan.eval.released.longproc:LongProc",
        axes=Axes(rows="subtask", columns="output_length"),
        scorers=("longproc", "longproc_partial"),
        heading="LongProc",
        short="LongProc",
        data="Folder data/ of princeton-pli/LongProc.",
        reads=("paths", "strict"),
        examples=("--data longproc --levels 0.5k --max-new-tokens 8",),
    ),
    TaskEntry(
        "needlebench",
        "Facts of two languages among essays: one, one at every depth, and chains of two to five that take reasoning.",
        config="longspan.eval.released.needlebench:NeedleBenchConfig",
        task="longspan.eval.released.needlebench:NeedleBench",
        axes=Axes(rows="subtask", columns="length"),
        scorers=(
            "contains_exactly",
            "needlebench_keywords",
            "boxed_name",
            "needlebench_needle",
            "needlebench_words",
        ),
        heading="NeedleBench",
        cluster="haystack",
        short="NeedleBench",
        data="Files of opencompass/NeedleBench.",
        reads=("paths",),
        examples=(
            "--data needlebench --size 4k --lengths 600 --depths 0.5 --languages English --samples 1 "
            "--kinds single_retrieval,multi_retrieval --max-new-tokens 8",
        ),
    ),
    TaskEntry(
        "ancestral_trace",
        "NeedleBench's many hops: a chain of relations in any order, at whose other end a person is sought.",
        config="longspan.eval.released.ancestral_trace:AncestralTraceConfig",
        task="longspan.eval.released.ancestral_trace:AncestralTrace",
        axes=Axes(rows="question_type", columns="num_needles"),
        scorers=("boxed_name",),
        heading="Ancestral trace (NeedleBench)",
        data="names.json of opencompass/NeedleBench.",
        reads=("paths",),
        examples=(
            "--data needlebench --prompts needlebench/atc.py --num-needles 2,4 --samples 1 --max-new-tokens 8",
        ),
    ),
    TaskEntry(
        "harness",
        "Published benchmarks: lm-eval's LongBench, InfiniteBench, MMLU, BABILong; long-llm, HELMET.",
        scorers=("by_metric",),
        heading="Benchmarks",
    ),
)
_REGISTERED: dict[str, TaskEntry] = {entry.name: entry for entry in _BUILT_IN}


def register(entry: TaskEntry) -> None:
    """Add a task.

    Raises:
        ArgumentError: another one has its name, a place is not "module:Class", or an axis has the name of a field that
            every record has.
    """
    for place in (entry.config, entry.task):
        module, colon, name = place.partition(":")
        if place and not (colon and name.isidentifier() and all(map(str.isidentifier, module.split(".")))):
            raise ArgumentError(
                f"the task {entry.name} is at no place", found=repr(place), allowed="module:Class"
            )
    if taken := sorted(_FIELDS.intersection(filter(None, entry.axes or ()))):
        raise ArgumentError(f"the axes of {entry.name} are fields of every record", found=", ".join(taken))
    known = _REGISTERED.get(entry.name)
    if known is not None and known != entry:
        raise ArgumentError(
            "there is a task of this name already", found=repr(entry.name), fix="give it another"
        )
    _REGISTERED[entry.name] = entry


def built_in() -> Mapping[str, TaskEntry]:
    """Return our own tasks by name."""
    return {entry.name: entry for entry in _BUILT_IN}


def entries() -> Mapping[str, TaskEntry]:
    """Return every task by name: ours, those registered, and those of installed packages."""
    _register_installed()
    return dict(_REGISTERED)


def entry_of(name: str) -> TaskEntry | None:
    """Return the entry of a task, None for one that is not registered."""
    if name not in _REGISTERED:
        _register_installed()
    return _REGISTERED.get(name)


@cache
def _register_installed() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        entry = point.load()
        if not isinstance(entry, TaskEntry):
            raise ArgumentError(
                f"the entry point {point.name} of {ENTRY_POINTS} is not a task",
                found=type(entry).__name__,
                allowed="a TaskEntry",
            )
        register(entry)
