"""Writes what the survey of families finds to docs/models.md: `python -m tests.models.family_page`."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import transformers

from tests.models.family_columns import COLUMNS, all_columns
from tests.models.family_survey import Finding, survey_all

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

HEAD = """# Model families

Every causal language model of transformers {version}, built small from its config class and compared with
transformers' own eager attention: two documents in one row have to give each document's own logits and every gradient,
with windows where the family has them. A test does this and compares the page with what it finds;
`python -m tests.models.family_page` writes it.

## Right: {count}

Attention sinks, chunked attention, values of another width than keys (latent attention: the narrower side is filled up
with zeros, so DeepSeek's values take 1.5 times their memory and work), and logits that are scaled or capped are
among them. Capped attention scores (Gemma 2) have no flash kernel: they are computed dense, in tiles,
which is slow.

Hybrids are among them, too: gated delta nets (Qwen3-Next, Qwen3.5, Olmo-Hybrid) and KDA (Kimi-Linear), Mamba-2
(Nemotron-H, Granite 4-H, Falcon-H1, Bamba, Zamba2) and Mamba-1 (Jamba, Zamba), short convolutions (LFM2, LFM3) and
lightning attention (MiniMax). State and convolution start anew at each document. The kernels of
`pip install 'longspan[hybrid]'` are told where documents begin (but Mamba-1's, which takes none); without them plain
torch computes documents apart, which is slow. On several processes these layers trade tokens for heads, as Ulysses
does, beside any schedule of attention: `longspan doctor --certify --layers all` proves it. Heads that do not divide are
dealt out unevenly; fewer heads than processes to a row are refused, and so are `compile_blocks` and documents that
branch.

What else was tried with each, with the same small model:

| Column | What has to hold |
|---|---|
| apart | other words in one document change nothing in the next |
| chunks | a row walked in chunks (`memory.chunk_tokens`) has the loss and every gradient of the row at once |
| prefix | answers behind a shared prefix have the losses of prompts that are read alone |
| LoRA | an adapter (`all-linear`) comes back from its folder, and merged into a model that transformers reads |
| export | transformers reads the exported folder as the same model |
| ring, ulysses | two processes that share a row have its loss and every gradient |

A number is a refusal, below the table: the message that a user gets.

"""


def page(findings: Mapping[str, Finding], columns: Mapping[str, Mapping[str, Finding]]) -> str:
    """Return the page of families."""
    right = [family for family, finding in findings.items() if finding.verdict == "right"]
    lines = [
        *_table(right, columns),
        *_grouped("Refused, with the reason that the message gives", "refused", findings),
        *_grouped("Not built small, so not known", "unbuilt", findings),
    ]
    head = HEAD.format(version=transformers.__version__, count=len(right))
    return (head + "\n".join(lines)).rstrip() + "\n"


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the cells of the right families on a page; a refusal as its reason."""
    reasons = dict(line.split(". ", 1) for line in text.splitlines() if line.partition(". ")[0].isdigit())
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 1 + len(COLUMNS) and cells[1:] != list(COLUMNS) and set(cells[0]) != {"-"}:
            rows[cells[0]] = [reasons.get(cell, cell) for cell in cells[1:]]
    return rows


def _table(right: list[str], columns: Mapping[str, Mapping[str, Finding]]) -> Iterator[str]:
    yield f"| Family | {' | '.join(COLUMNS)} |"
    yield "|---" * (1 + len(COLUMNS)) + "|"
    numbers: dict[str, int] = {}
    for family in right:
        cells = []
        for name in COLUMNS:
            finding = columns[family][name]
            reason = finding.reason.replace("|", "/")
            cells.append(
                "yes" if finding.verdict == "yes" else str(numbers.setdefault(reason, len(numbers) + 1))
            )
        yield f"| {family} | {' | '.join(cells)} |"
    yield ""
    yield from (f"{number}. {reason}" for reason, number in numbers.items())
    yield ""


def _grouped(title: str, verdict: str, findings: Mapping[str, Finding]) -> Iterator[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for family, finding in findings.items():
        if finding.verdict == verdict:
            groups[finding.reason].append(family)
    yield f"## {title}: {sum(map(len, groups.values()))}"
    yield ""
    yield "| Families | Reason |"
    yield "|---|---|"
    for reason, names in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        yield f"| {', '.join(names)} | {reason.replace('|', '/')} |"
    yield ""


def wrong_ones(
    findings: Mapping[str, Finding], columns: Mapping[str, Mapping[str, Finding]]
) -> dict[str, str]:
    """Return what is neither right nor refused, by name."""
    wrong = {family: finding.reason for family, finding in findings.items() if finding.verdict == "wrong"}
    for family, cells in columns.items():
        wrong |= {f"{family} {name}": each.reason for name, each in cells.items() if each.verdict == "wrong"}
    return wrong


if __name__ == "__main__":
    found = survey_all()
    more = all_columns(family for family, finding in found.items() if finding.verdict == "right")
    PAGE.write_text(page(found, more), encoding="utf-8")
    bad = wrong_ones(found, more)
    sys.exit(f"wrong: {bad}" if bad else 0)
