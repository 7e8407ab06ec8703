"""Every longspan line of docs/coming-from.md runs, in turn, on tiny data.

Lengths and budgets of the page are those of the projects; here they are scaled down by one table.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from longspan.data.store import TokenStore
from longspan.data.tokenizer import train_bpe

PAGE = Path(__file__).parents[2] / "docs" / "coming-from.md"
SMALL = {
    "131072": "64",
    "65536": "64",
    "64k,32k,8k": "64,32,8",
    "64k": "64",
    "4096": "16",
    "28672": "48",
    "5B": "3000",
    "2B": "1500",
    "1000": "4",
    "5000000": "20",
    "35000": "4",
    "2500000": "20",
    "200000000": "5",
    "512": "16",
}
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("longspan ")]


def text(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 7 + i * i + i // 3) % 10] for i in range(words)) + ".\n"


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    lengths = [20, 200, 30, 400, 90, 700]
    texts = [text(i, lengths[i % 6]) for i in range(60)]
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
    turns = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    train_bpe(texts, tmp_path / "tokenizer", vocab_size=300, special_tokens=(*specials, *turns))
    domains = ("RedPajamaBook", "RedPajamaArXiv", "RedPajamaC4")
    for part in range(3):
        records = [
            {"text": t, "meta": {"redpajama_set_name": domains[i % 3]}} for i, t in enumerate(texts[part::3])
        ]
        write(tmp_path / "slimpajama" / "train" / f"part-{part}.jsonl", records)
    write(tmp_path / "slimpajama" / "validation" / "part-0.jsonl", [{"text": "not trained", "meta": {}}])
    write(tmp_path / "books.jsonl", [{"text": text(i, 300 + i)} for i in range(80)])
    files = [{"text": text(i, 40), "repo": f"r{i % 4}", "path": f"{i:02d}.py"} for i in range(40)]
    write(tmp_path / "code" / "files.jsonl", files)
    chat = [
        {"messages": [{"role": "user", "content": text(i, 5)}, {"role": "assistant", "content": text(i, 9)}]}
        for i in range(5)
    ]
    write(tmp_path / "chats.jsonl", chat)
    for domain in ("arxiv", "book"):
        records = [{"text": text(i, 150)} for i in range(120)]
        write(tmp_path / "redpajama" / domain / "0.jsonl", records)
    return tmp_path


def test_the_page_runs_from_top_to_bottom(longspan, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that the page promises and that does not exist, or fails, sends a reader away."""
    lines = commands()
    assert len(lines) > 15
    monkeypatch.chdir(workplace)
    for line in lines:
        outcome = longspan([SMALL.get(word, word) for word in shlex.split(line)[1:]])
        assert outcome.code == 0, f"{line}\n{outcome.err}"
    rows = sorted((workplace / "rows").rglob("*.jsonl"))
    row = json.loads(rows[0].read_text().splitlines()[0])
    assert len(row["input_ids"]) == 64 and isinstance(row["labels"], int)
    assert row["source"][0]["start"] == 0 and row["source"][-1]["end"] == 64
    assert len(TokenStore(workplace / "stores" / "slimpajama")) == 60, "the split train alone"
    pairs = {path.parent.name for path in (workplace / "8k_ab" / "train").rglob("index.json")}
    assert pairs == {"arxiv", "book"}
    lengths = np.load(workplace / "npy" / "book" / "book.npy")
    assert lengths[0] == 120 and len(lengths) == 121 + lengths[1:121].sum()
