"""The card of an exported model: what it was trained with and what was measured of it, from records alone.

Only evaluations of the very model are taken, known by the fingerprint of its weights and RoPE; what was not measured
is said, and nothing is claimed that no record shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from longspan.core.errors import DataError
from longspan.core.intervals import EFFECTIVE_THRESHOLD
from longspan.core.units import format_count
from longspan.report.effective import effective_note, effective_text
from longspan.report.evaluation import Evaluation
from longspan.report.headline import effective_grids
from longspan.report.layouts import length_text
from longspan.report.load import LoadedRun, RecordFile
from longspan.report.maps_view import rope_words
from longspan.report.ppl_tables import bits_per_byte, perplexity
from longspan.report.tables import Grid, Tally, by_group, tally_of
from longspan.report.view import MISSING, decimal, interval_text, merge_records, percent, unscored_text

LOADING = """## How to load it

The RoPE and the context length are in `config.json`; nothing has to be set.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

```sh
vllm serve {name} --max-model-len {context}
```

For llama.cpp convert the folder with its `convert_hf_to_gguf.py`, and start the server with `-c {context}`. Not every
RoPE survives that: `longspan export --gguf` refuses those that do not, and holds the file against the model's
(`{rope_type}`).
"""


def model_card(
    runs: Sequence[LoadedRun],
    *,
    fingerprint: str,
    name: str,
    config: Mapping[str, Any],
    base: str | None = None,
) -> str:
    """Return the README.md of an exported model.

    Args:
        runs: folders with its records; what they say of how it was trained is told as well.
        fingerprint: of the model, as the headers of records have it.
        name: of the exported folder.
        config: content of its config.json.
        base: model that it was made from, where that is known.

    Raises:
        DataError: none of the records is of this model.
    """
    records = merge_records(runs)
    own = [file for file in records if file.model == fingerprint]
    if not own:
        found = sorted({f"{file.label}: {file.model}" for file in records})
        raise DataError(
            "no record is of the model that is exported, so there is nothing to put on its card",
            found=", ".join(found) or "no records",
            allowed=f"records of the model {fingerprint}",
            fix="evaluate what is exported, `longspan eval ... --model CHECKPOINT --out RUN`, and name that run",
        )
    evaluation = Evaluation.from_records(own)
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    context = text.get("max_position_embeddings")
    parts = [
        _front_matter(base),
        f"# {name}\n",
        _about(base, context, rope, fingerprint),
        _effective(evaluation),
        _scores(evaluation),
        _perplexity(evaluation),
        _data(runs),
        LOADING.format(name=name, context=context, rope_type=rope.get("rope_type", "default")),
        _how_measured(own),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(base: str | None) -> str:
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["long-context", "longspan"],
    }
    if base is not None and not Path(base).is_absolute():
        head["base_model"] = base
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def _about(base: str | None, context: Any, rope: Mapping[str, Any], fingerprint: str) -> str:
    made = f"Made from `{base}` with longspan. " if base else "Made with longspan. "
    return (
        f"{made}Context length {length_text(context) if context else MISSING} tokens, RoPE {rope_words(dict(rope))}. "
        f"The weights are `{fingerprint}` in the records that the numbers below come from. Licence and intended use "
        "are for whoever publishes it to say.\n"
    )


def _effective(ev: Evaluation) -> str:
    grids = effective_grids(ev)
    if not grids:
        return "## Effective context\n\nNot measured.\n"
    lines = [
        "## Effective context\n",
        f"The longest length at which, as at every shorter one, the lower bound of the 95% interval is above "
        f"{EFFECTIVE_THRESHOLD:.0%}.\n",
        "| Task | Tokens | Accuracy by length (95% interval) |",
        "|---|---|---|",
    ]
    for task, by_label in grids.items():
        for grid in by_label.values():
            note = effective_note(grid)
            reached = effective_text(grid) + (f" ({note})" if note else "")
            lines.append(f"| {_cell(ev.layouts[task].short)} | {_cell(reached)} | {_by_length(grid)} |")
    return "\n".join(lines) + "\n"


def _by_length(grid: Grid) -> str:
    return ", ".join(
        f"{length_text(int(length))}: {percent(tally.mean)} ({interval_text(tally)}; {tally.scored:,})"
        for length in grid.columns
        if (tally := grid.by_column[length]).scored
    )


def _scores(ev: Evaluation) -> str:
    rows: list[tuple[str, Tally]] = []
    for task, by_label in ev.scores.items():
        for samples in by_label.values():
            for key, group in by_group(samples, "dataset", "subtask", "metric").items():
                rows.append((" ".join(filter(None, (task, *key))), tally_of(group)))
    if not rows:
        return ""
    lines = ["## Scores\n", "| Task | Score | 95% interval | Samples |", "|---|---|---|---|"]
    for name, tally in rows:
        lost = unscored_text(tally)
        lines.append(
            f"| {_cell(name)} | {percent(tally.mean)} | {interval_text(tally)} | "
            f"{tally.scored:,}{f' ({_cell(lost)})' if lost else ''} |"
        )
    return "\n".join(lines) + "\n"


def _perplexity(ev: Evaluation) -> str:
    lines = []
    for table in ev.ppl.values():
        for length, sums in sorted(table.by_length.items()):
            bits = bits_per_byte(sums)
            lines.append(f"| {length_text(length)} | {decimal(perplexity(sums))} | {decimal(bits)} |")
    if not lines:
        return ""
    head = ["## Perplexity\n", "| Window, tokens | Perplexity | Bits per byte |", "|---|---|---|"]
    return "\n".join(head + lines) + "\n"


def _data(runs: Sequence[LoadedRun]) -> str:
    """Return what the runs say of the tokens that it was trained on."""
    lines = []
    for run in runs:
        for summary in run.lengths:
            total = sum(entry.get("tokens", 0) for entry in summary["sources"].values()) or 1
            shares = ", ".join(
                f"{source} {entry.get('tokens', 0) / total:.0%}"
                for source, entry in sorted(
                    summary["sources"].items(), key=lambda item: -item[1].get("tokens", 0)
                )
            )
            lines.append(f"- {summary['title']}: {format_count(total)} tokens ({shares})")
        if run.metrics:
            last = run.metrics[-1]
            lines.append(f"- {run.name}: {last['step']:,.0f} steps, {format_count(last['tokens'])} tokens")
    return "## Training data\n\n" + "\n".join(lines) + "\n" if lines else ""


def _how_measured(files: Sequence[RecordFile]) -> str:
    lines = ["## How it was measured\n"]
    for file in files:
        params = {
            key: value
            for key, value in file.params.items()
            if isinstance(value, (str, int, float, list)) and value not in ("", [])
        }
        words = json.dumps(params, ensure_ascii=False, sort_keys=True)
        unfinished = "" if file.complete else ", not finished"
        lines.append(f"- {file.task}, {len(file.samples):,} samples{unfinished}: `{_cell(words)[:600]}`")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Keep text from ending a cell, a line or a piece of code."""
    return " ".join(text.replace("|", "\\|").replace("`", "'").split())
