"""Tiny data on which the code of the projects of docs/coming-from.md was run, and how its output is compared.

`goldens/theirs.json` holds what their code made of it: the number of its rows and a digest of them. It was written
once by calling their functions as published, on the texts below with the tokenizer below:

    datatools                       `pack_fn`; `Tokenizer.encode` and `ChatFormat.encode_dialog_prompt` of its Llama 3
    Long-Context-Data-Engineering   `writer_process`; `main`, with lists in place of processes and pipes
    CEPE                            `process`, `filter_length`, `reshape`
    ProLong                         `DataCollator`, `compute_loss` of model (with `logit` for logits) and trainer
    longllm_qlora                   `Data._process_...`, `process_longbench`

Packages they import and do not use there (datasets, streaming, simple_parsing, dask) were empty modules. They got the
documents in the order of the files; on a corpus it is there a race of processes, or a shuffle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors

LENGTH = 64
"""Tokens of a row; theirs are 65,536 and 131,072."""
MAX_LENGTH = 120
"""Where longllm_qlora cuts a text and leaves out a conversation; 81,920 there."""
LONGBENCH_LENGTH = 1600
"""Tokens of a prompt of LongBench; 31,500 there."""
SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORDS = ("user", "assistant", "\u010a\u010a", "\u010a\u010a\u010a")
"""Single tokens, as in Llama 3: their masks count on it."""
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_tokenizer(folder: Path) -> Path:
    """Write a byte tokenizer in the form of Llama 3's: it begins texts with BOS. Its ids follow from no training."""
    merges = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [token for token in dict.fromkeys(map("".join, merges)) if token not in tokens]
    model = tokenizers.Tokenizer(
        models.BPE({token: n for n, token in enumerate(tokens)}, list(dict.fromkeys(merges)))
    )
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(list(SPECIALS))
    begin = SPECIALS[0]
    model.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": SPECIALS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_ranks(path: Path) -> Path:
    """Write a rank file in the form of Llama 3's `tokenizer.model`: all bytes, and the words that are single tokens."""
    words = [word.replace("\u010a", "\n").encode() for word in WORDS]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1))
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path


def text(number: int, words: int) -> str:
    """Return a text of so many words."""
    return " ".join(NAMES[(number * 7 + i * i + i // 3) % 10] for i in range(words)) + ".\n"


def books() -> list[str]:
    """Texts below, at and far above the length of a row."""
    return [text(n, (3, 40, 9, 61, 13, 120, 5)[n % 7] + n) for n in range(40)]


def slimpajama() -> list[dict[str, Any]]:
    """Records of three domains."""
    domains = ("RedPajamaBook", "RedPajamaArXiv", "RedPajamaC4")
    return [{"text": each, "meta": {"redpajama_set_name": domains[n % 3]}} for n, each in enumerate(books())]


def large_slimpajama() -> list[dict[str, Any]]:
    """Records of all seven domains on both sides of 4,096 * 3.68 characters; some domains beyond their shares of 1m."""
    domains = ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")
    return [
        {
            "text": text(n, 50) * ((n * 37) % 190 + 1),
            "meta": {"redpajama_set_name": f"RedPajama{domains[n % 7]}"},
        }
        for n in range(70)
    ]


def redpajama() -> dict[str, list[str]]:
    """Texts of CEPE's two domains by file."""
    return {
        f"{domain}/{file}": [text(10 * file + n + shift, 6 + 11 * n) for n in range(4)]
        for shift, domain in ((0, "arxiv"), (3, "book"))
        for file in range(6)
    }


def packed_chats() -> list[dict[str, Any]]:
    """Return packed rows with masks, as ProLong's conversations: of one token, without an answer, and long."""
    rows = []
    for number, ends in enumerate(([9, 10, 24], [24], [3, 20, 24])):
        ids = [(number * 5 + place * place) % 31 for place in range(24)]
        mask = [int((place * 7 + number) % 5 > 1 and not (number == 2 and place < 3)) for place in range(24)]
        rows.append({"input_ids": ids, "indices": list(pairwise([0, *ends])), "mask": mask})
    return rows


def logit(token: int, word: int) -> float:
    """Return what a model that sees one token gives for the next."""
    return math.sin(token * 31 + word * word)


def token_file(number: int) -> list[list[int]]:
    """Return documents of a token file of CEPE; below 100 files of a domain it is cut by documents here."""
    return [
        [1, *((number * 31 + n * n + document) % 97 + 3 for n in range(9 + document)), 2]
        for document in range(3)
    ]


def conversations() -> list[list[dict[str, str]]]:
    """Conversations with a system turn, white space around contents, two answers, and one that is too long."""

    def turns(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[n % 2], "content": each} for n, each in enumerate(contents)]

    return [
        turns("How many?", "Three."),
        turns("  How many? \n", " Three, or so. \n\n"),
        [{"role": "system", "content": "Be brief."}, *turns("Who?", "Ada", "Sure?", "Yes, she did.")],
        turns("Read this.", text(1, 60)),
        turns("What is in it?\n\nSay it.", "It says:\n\n1. one\n2. two "),
        # The header's two line breaks and the answer's own are one token.
        turns("Go on.", "\nSo it goes.\n"),
    ]


def questions(number: int) -> list[dict[str, Any]]:
    """Return two questions of LongBench, of which the second has a long context."""
    return [
        {
            "input": f"What is {NAMES[number % 10]}?",
            "context": text(number, words),
            "answers": ["it"],
            "all_classes": ["it"],
        }
        for words in (5, 700)
    ]


def digest(rows: Iterable[Any]) -> dict[str, Any]:
    """Return how many rows there are and what they hold, whatever their order."""
    each = sorted(hashlib.sha256(json.dumps(row).encode()).hexdigest() for row in rows)
    return {"rows": len(each), "sha256": hashlib.sha256("".join(each).encode()).hexdigest()}


def short_digests(rows: Iterable[Any]) -> list[str]:
    """Return 8 characters for each different row, sorted."""
    return sorted({hashlib.sha256(json.dumps(row).encode()).hexdigest()[:8] for row in rows})
