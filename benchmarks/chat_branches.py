"""Many questions on one text, as a record with branches: CPU seconds to write and tokenise it.

python benchmarks/chat_branches.py --tokenizer SmolLM2 --chat-template qwen --text essays.txt
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from longspan.data.chat import load_chat_format
from longspan.data.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--chat-template", default=None, help="default: the tokenizer's own")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64_000, help="of the text")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 40])
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    chat = load_chat_format(tokenizer, arguments.chat_template)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens]
    text = tokenizer.decode(ids)
    print("| questions | tokens | CPU s |\n|---|---|---|")
    for count in arguments.questions:
        begun = time.process_time()
        encoded = chat.encode_record([{"role": "user", "content": text}], {"branches": branches(count)})
        print(f"| {count} | {len(encoded.ids):,} | {time.process_time() - begun:.2f} |")


def branches(count: int) -> list[list[dict[str, Any]]]:
    """Return so many questions with their answers."""
    return [
        [
            {"role": "user", "content": f"\n\nWhat does the author say of point {number}?"},
            {"role": "assistant", "content": f"He says that {number} is so."},
        ]
        for number in range(count)
    ]


if __name__ == "__main__":
    main()
