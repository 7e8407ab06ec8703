"""Speed and memory of the data engine, beside other tools: text to rows, packing anew, memory, cores.

    python benchmarks/data.py --peers peers/bin/python            everything in data.md, about 20 minutes
    python benchmarks/data.py --only repack,best_fit              some parts; without --peers only our side
    python benchmarks/data.py --peers peers/bin/python --full     also 4 GB of input

Every process is pinned to one core and libraries to one thread. Headline figures are tokens per CPU-second of a
command and its children, net of start-up and imports; the gross figure stands beside it. Runs of all tools take
turns, and each figure is the median of `--repeats`. Tables go to stdout, numbers to WORK/results.json.

The peers live in an environment of their own:

    python3.11 -m venv peers
    peers/bin/pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 fastokens==0.3.5 \\
        datatrove==0.10.1 orjson simple-parsing universal-pathlib pyarrow pandas pillow \\
        zstandard zstd xxhash brotli python-snappy catalogue
    peers/bin/pip install --no-deps datatools-py==0.5 mosaicml-streaming==0.13.0
    cat > peers/lib/python3.11/site-packages/torchvision.py <<'END'     # streaming imports it, nothing here uses it
    import sys, types
    for name in ("datasets", "transforms", "transforms.functional"):
        sys.modules["torchvision." + name] = types.SimpleNamespace(VisionDataset=object, to_tensor=None)
    END
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_corpus import SOURCES
from data_measure import (
    Command,
    Failed,
    Numbers,
    Usage,
    ask,
    finish,
    import_only,
    list_imports,
    machine,
    median,
    run,
    start,
    total,
)
from data_tables import render

HERE = Path(__file__).parent
ROW = 65536
OTHER_ROW = 32768
COPIES = 4
SMALLEST_DIFFERENCE = 0.15


@dataclass(frozen=True)
class Setup:
    """Where and how much; made once from the command line."""

    work: Path
    peers: str | None
    repeats: int
    cores: list[int]
    megabytes: float
    sources: tuple[str, ...]
    vocab: int
    sentencepiece_vocab: int
    grown_megabytes: tuple[float, ...]
    scaling_megabytes: float
    spin: int
    best_fit_documents: int

    @property
    def corpus(self) -> Path:
        return self.work / "corpus"

    @property
    def subset(self) -> Path:
        """The part of the corpus that the slow tools get: its first file."""
        return self.work / "subset"

    @property
    def tiny(self) -> Path:
        return self.work / "tiny"

    def tokenizer(self, kind: str = "bytelevel") -> str:
        return str(self.work / "tokenizers" / kind)


@dataclass(frozen=True)
class Tool:
    """A way from a folder of jsonl to something, as command lines that are run one after another."""

    name: str
    python: str
    commands: Callable[[Path, Path], list[Command]]
    """(input folder, output folder) to commands; the output folder exists and is empty."""
    inputs: Path
    tiny: Path
    """What `inputs` is, of half a megabyte."""
    digest: Callable[[Path], Command] | None = None
    """Output folder to the command that prints documents, tokens and a hash of the ids."""


def longspan(*arguments: object) -> Command:
    return [sys.executable, "-m", "longspan", "data", *map(str, arguments)]


def own(*arguments: object) -> Command:
    return [sys.executable, str(HERE / "data_own.py"), *map(str, arguments)]


def compare(setup: Setup, part: str, tools: list[Tool]) -> dict[str, Numbers]:
    """Run all tools in turns; return CPU seconds of imports, of a tiny input and of the whole, and outputs."""
    core = setup.cores[:1]
    # tool -> repeats -> what each of its commands took
    taken: dict[str, dict[str, list[list[Usage]]]] = {
        kind: {tool.name: [] for tool in tools} for kind in ("imports", "tiny", "whole")
    }
    imports = {tool.name: _imports(setup, part, tool) for tool in tools}
    for repeat in range(setup.repeats):
        for tool in tools:
            say(f"{part}: {tool.name}, run {repeat + 1} of {setup.repeats}")
            taken["imports"][tool.name].append([run(one, cores=core) for one in imports[tool.name]])
            for kind, inputs in (("tiny", tool.tiny), ("whole", tool.inputs)):
                out = fresh(setup.work / part / (tool.name if kind == "whole" else f"{tool.name} tiny"))
                commands = tool.commands(inputs, out)
                taken[kind][tool.name].append([run(one, cores=core) for one in commands])
    found: dict[str, Numbers] = {}
    for tool in tools:
        imported, tiny, whole = (median(map(total, taken[kind][tool.name])) for kind in taken)
        found[tool.name] = {
            "gross_cpu_s": whole.cpu_s,
            "imports_cpu_s": imported.cpu_s,
            "tiny_cpu_s": tiny.cpu_s,
            "wall_s": whole.wall_s,
            "peak_mib": whole.peak_mib,
            "commands_cpu_s": [median(column).cpu_s for column in zip(*taken["whole"][tool.name])],
            "runs_cpu_s": [total(usages).cpu_s for usages in taken["whole"][tool.name]],
        }
        if tool.digest is not None:
            found[tool.name]["output"] = ask(tool.digest(setup.work / part / tool.name), core)
    return found


def _imports(setup: Setup, part: str, tool: Tool) -> list[Command]:
    """Return, for each command of a tool, the one that only imports what it imports."""
    out = fresh(setup.work / part / f"{tool.name} imports")
    found: list[Command] = []
    for number, command in enumerate(tool.commands(tool.tiny, out)):
        modules = out / f"imports-{number}.txt"
        list_imports(command, modules, cores=setup.cores[:1])
        found.append(import_only(tool.python, modules))
    return found


def add_rates(found: dict[str, Numbers], tokens: dict[str, int]) -> dict[str, Numbers]:
    """Add tokens per CPU-second: gross, net of imports, and of what lies beyond the tiny input.

    None where the difference of two runs is too small against them to say anything.
    """
    for name, numbers in found.items():
        numbers["tokens"], gross = tokens[name], numbers["gross_cpu_s"]
        spent = {"gross": 0.0, "net": numbers["imports_cpu_s"], "further": numbers["tiny_cpu_s"]}
        for kind, seconds in spent.items():
            told = gross - seconds > SMALLEST_DIFFERENCE * gross
            numbers[f"{kind}_rate"] = tokens[name] / (gross - seconds) if told else None
    return found


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def tokenized(tokenizer: str) -> Callable[[Path, Path], list[Command]]:
    def commands(inputs: Path, out: Path) -> list[Command]:
        store = ["--tokenizer", tokenizer, "--source-field", "source", "--out", out / "store"]
        return [longspan("tokenize", inputs, *store)]

    return commands


def planned(tokenizer: str) -> Callable[[Path, Path], list[Command]]:
    def commands(inputs: Path, out: Path) -> list[Command]:
        return [
            *tokenized(tokenizer)(inputs, out),
            longspan("mix", out / "store", "--mode", "none", "--out", out / "mixture"),
            longspan("pack", out / "mixture", "--length", ROW, "--specials", "both", "--out", out / "rows"),
        ]

    return commands


def datatools(setup: Setup, *, fastokens: bool) -> Tool:
    python = str(setup.peers)
    tokenize = [python, "-m", "datatools.scripts.tokenize"]
    if fastokens:
        tokenize = [python, str(HERE / "data_peers.py"), "fastokens-tokenize"]

    def commands(inputs: Path, out: Path) -> list[Command]:
        files = sorted(map(str, inputs.glob("*.jsonl")))
        options = ["-T", setup.tokenizer(), "--chat_assistant_masking", "false", "--domain_by", "source"]
        pack = [python, "-m", "datatools.scripts.pack", f"{out}/mds", f"{out}/packed", "-l", str(ROW)]
        return [[*tokenize, *files, f"{out}/mds", *options], [*pack, "--bos_id", "0", "--eos_id", "1"]]

    name = "datatools + fastokens" if fastokens else "datatools"
    inputs = setup.corpus if fastokens else setup.subset
    return Tool(
        name,
        python,
        commands,
        inputs,
        setup.tiny,
        lambda out: peer(setup, "digest", "datatools", out / "mds"),
    )


def peer(setup: Setup, *arguments: object) -> Command:
    return [str(setup.peers), str(HERE / "data_peers.py"), *map(str, arguments)]


def own_digest(out: Path) -> Command:
    return own("digest", out / "store")


def bench_plan(setup: Setup) -> Numbers:
    """Text to rows, byte-level BPE: ours and the peers."""
    commands = planned(setup.tokenizer())
    tools = [
        Tool("longspan", sys.executable, commands, setup.corpus, setup.tiny, own_digest),
        Tool("longspan, subset", sys.executable, commands, setup.subset, setup.tiny, own_digest),
    ]
    if setup.peers:
        bpe = setup.tokenizer()

        def one(kind: str) -> Tool:
            return Tool(
                {"datatrove": "datatrove", "cepe": "CEPE's scheme"}[kind],
                str(setup.peers),
                lambda inputs, out: [peer(setup, kind, inputs, bpe, out / kind)],
                setup.subset,
                setup.tiny,
                lambda out: peer(setup, "digest", kind, out / kind),
            )

        tools += [datatools(setup, fastokens=True), datatools(setup, fastokens=False)]
        tools += [one("datatrove"), one("cepe")]
    return with_equality(compare(setup, "plan", tools))


def bench_sentencepiece(setup: Setup) -> Numbers:
    """Text to a store, sentencepiece-style BPE, beside the encode of the Hugging Face library."""
    tokenizer = setup.tokenizer("sentencepiece")
    commands = tokenized(tokenizer)
    tools = [
        Tool("longspan", sys.executable, commands, setup.corpus, setup.tiny, own_digest),
        Tool("longspan, subset", sys.executable, commands, setup.subset, setup.tiny, own_digest),
    ]
    if setup.peers:

        def encode(inputs: Path, out: Path) -> list[Command]:
            return [peer(setup, "encode", inputs, tokenizer)]

        tools.append(
            Tool(
                "tokenizers encode",
                str(setup.peers),
                encode,
                setup.subset,
                setup.tiny,
                lambda out: encode(setup.subset, out)[0],
            )
        )
    return with_equality(compare(setup, "sentencepiece", tools))


def with_equality(found: dict[str, Numbers]) -> dict[str, Numbers]:
    """Add rates, and whether a tool's ids are those of ours on the same text."""
    add_rates(found, {name: numbers["output"]["tokens"] for name, numbers in found.items()})
    ours = {numbers["output"]["tokens"]: numbers["output"] for numbers in list(found.values())[:2]}
    for numbers in found.values():
        numbers["ids_equal"] = ours.get(numbers["tokens"]) == numbers["output"]
    return found


def bench_repack(setup: Setup) -> Numbers:
    """The corpus four times, tokenized already, to rows of another length."""
    stores = _tokenized_once(setup, "longspan", tokenized(setup.tokenizer()), "store")
    tokens = ask(own("digest", stores[0]), setup.cores[:1])["tokens"] * COPIES
    pack = ("--length", OTHER_ROW, "--specials", "both", "--out")

    def plan(store: Path, out: Path) -> list[Command]:
        return [longspan("pack", *[store] * COPIES, *pack, out / "rows")]

    def materialize(store: Path, out: Path) -> list[Command]:
        return [longspan("pack", *[store] * COPIES, *pack, out / "rows", "--materialize", out / "packed")]

    tools = [
        Tool("longspan, plan only", sys.executable, plan, *stores),
        Tool("longspan, materialize", sys.executable, materialize, *stores),
    ]
    if setup.peers:

        def packed(mds: Path, out: Path) -> list[Command]:
            command = [str(setup.peers), "-m", "datatools.scripts.pack", *[str(mds)] * COPIES]
            return [[*command, f"{out}/packed", "-l", str(OTHER_ROW), "--bos_id", "0", "--eos_id", "1"]]

        peers = _tokenized_once(setup, "datatools", datatools(setup, fastokens=True).commands, "mds")
        tools.append(Tool("datatools pack", str(setup.peers), packed, *peers))
    found = compare(setup, "repack", tools)
    return add_rates(found, dict.fromkeys(found, tokens))


def _tokenized_once(
    setup: Setup, name: str, commands: Callable[[Path, Path], list[Command]], made: str
) -> tuple[Path, Path]:
    """Return what the first of the commands makes of the corpus and of the tiny input."""
    found = []
    for inputs in (setup.corpus, setup.tiny):
        out = setup.work / "repack-input" / name / inputs.name
        if not (out / made / "index.json").exists():
            run(commands(inputs, fresh(out))[0], cores=setup.cores[:1])
        found.append(out / made)
    return found[0], found[1]


def bench_best_fit(setup: Setup) -> Numbers:
    """Best fit over made-up documents; the slowest of the runs is not hidden."""
    runs = [ask(own("best_fit", setup.best_fit_documents), setup.cores[:1]) for _ in range(setup.repeats)]
    middle = sorted(runs, key=lambda numbers: numbers["plan_s"])[len(runs) // 2]
    return {**middle, "runs_plan_s": [numbers["plan_s"] for numbers in runs]}


def bench_memory(setup: Setup) -> list[Numbers]:
    """Peak memory and CPU time of tokenizing inputs of growing size."""
    rows = []
    for megabytes in setup.grown_megabytes:
        say(f"memory: {megabytes:g} MB")
        inputs, out = grown(setup, megabytes), fresh(setup.work / "memory")
        usage = run(tokenized(setup.tokenizer())(inputs, out)[0], cores=setup.cores[:1])
        tokens = ask(own_digest(out), setup.cores[:1])["tokens"]
        rows.append({"megabytes": megabytes, "tokens": tokens, **usage._asdict()})
        shutil.rmtree(out)
    return rows


def grown(setup: Setup, megabytes: float) -> Path:
    folder = setup.work / f"grown-{megabytes:g}"
    if not folder.exists():
        command = [sys.executable, str(HERE / "data_corpus.py"), "grow", str(setup.corpus)]
        with_part = folder.with_suffix(".part")
        run([*command, str(fresh(with_part)), "--megabytes", str(megabytes)], cores=setup.cores[:1])
        with_part.rename(folder)
    return folder


def bench_workers(setup: Setup) -> Numbers | None:
    """Two workers against one, beside two spinning processes against one, in turns on the same two cores."""
    cores = setup.cores[:2]
    if len(cores) < 2:
        say("workers: this machine gives the benchmark one core; left out")
        return None
    inputs = grown(setup, setup.scaling_megabytes)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, commands: list[Command]) -> None:
        say(f"workers: {name}")
        running = [(start(command, cores=cores), command) for command in commands]
        walls = [finish(started, command)[0].wall_s for started, command in running]
        seconds.setdefault(name, []).append(max(walls))

    for _ in range(setup.repeats):
        for workers in (1, 2):
            spinning = [own("spin", setup.spin)] * workers
            timed(f"spin {workers}", spinning)
            for name, folder in (("start", setup.tiny), ("tokenize", inputs)):
                command = tokenized(setup.tokenizer())(folder, fresh(setup.work / "workers"))[0]
                timed(f"{name} {workers}", [[*command, "--workers", str(workers)]])
    shutil.rmtree(setup.work / "workers")
    wall = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    spin = 2 * wall["spin 1"] / wall["spin 2"]
    gross = wall["tokenize 1"] / wall["tokenize 2"]
    net = (wall["tokenize 1"] - wall["start 1"]) / (wall["tokenize 2"] - wall["start 2"])
    return {
        "megabytes": setup.scaling_megabytes,
        "wall_s": wall,
        "runs_wall_s": seconds,
        "spin_speedup": spin,
        "speedup": gross,
        "speedup_net": net,
        "share_of_spin": gross / spin,
        "share_of_spin_net": net / spin,
    }


PARTS: dict[str, Callable[[Setup], Any]] = {
    "plan": bench_plan,
    "sentencepiece": bench_sentencepiece,
    "repack": bench_repack,
    "best_fit": bench_best_fit,
    "memory": bench_memory,
    "workers": bench_workers,
}


def prepare(setup: Setup) -> Numbers:
    """Make corpus, subset, tiny input and tokenizers, unless they stand there; return the corpus in numbers."""
    described = setup.work / "corpus.json"
    make = [sys.executable, str(HERE / "data_corpus.py")]
    if not described.exists():
        say("making the corpus")
        parts = max(1, round(setup.megabytes / 27))
        command = [*make, "corpus", str(fresh(setup.corpus)), "--megabytes", str(setup.megabytes)]
        command += ["--parts", str(parts), "--sources", *setup.sources]
        counts = ask(command, setup.cores[:1])
        first = sorted(setup.corpus.glob("*.jsonl"))[0]
        os.link(first, fresh(setup.subset) / first.name)
        lines: list[str] = []
        with first.open(encoding="utf-8") as file:
            # Two rows at least: datatools fails where it packs none.
            while sum(map(len, lines)) < 8 * ROW and (line := file.readline()):
                lines.append(line)
        (fresh(setup.tiny) / "tiny.jsonl").write_text("".join(lines), encoding="utf-8")
        say("training the tokenizers")
        sizes = ["--vocab", str(setup.vocab), "--sentencepiece-vocab", str(setup.sentencepiece_vocab)]
        tokenizers = str(fresh(setup.work / "tokenizers"))
        run([*make, "tokenizers", str(setup.corpus), tokenizers, *sizes], cores=setup.cores[:1])
        subset_bytes = first.stat().st_size
        described.write_text(json.dumps({"sources": counts, "subset_jsonl_bytes": subset_bytes}))
    return json.loads(described.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", help="Python of the environment that holds the peers.")
    parser.add_argument("--work", type=Path, default=Path("bench-data"), help="Folder for text and output.")
    parser.add_argument("--only", default=",".join(PARTS), help="Parts to run, comma-separated.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="Also 4 GB of input.")
    parser.add_argument("--dry-run", action="store_true", help="Tiny sizes, to see that every part runs.")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    dry = options.dry_run
    setup = Setup(
        work=options.work.absolute(),
        peers=options.peers,
        repeats=1 if dry else options.repeats,
        cores=sorted(os.sched_getaffinity(0)),
        megabytes=1 if dry else 110,
        sources=("stdlib",) if dry else tuple(name for name, *_ in SOURCES),
        vocab=1000 if dry else 32_000,
        sentencepiece_vocab=1000 if dry else 16_000,
        grown_megabytes=(1, 2) if dry else (100, 1000, 4000) if options.full else (100, 1000),
        scaling_megabytes=1 if dry else 500,
        spin=10**5 if dry else 10**8,
        best_fit_documents=10**3 if dry else 10**6,
    )
    setup.work.mkdir(parents=True, exist_ok=True)
    results: Numbers = {"machine": machine(setup.peers), "corpus": prepare(setup)}
    for part in parts:
        try:
            results[part] = PARTS[part](setup)
        except Failed as error:
            sys.exit(f"{part}: {error}")
        (setup.work / "results.json").write_text(json.dumps(results, indent=1))
    print(render(results))


if __name__ == "__main__":
    main()
