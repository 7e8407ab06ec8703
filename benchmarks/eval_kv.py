"""What a smaller KV cache does to a model: losses of text, facts found in a text, memory of a token.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/eval_kv.py --model SmolLM2-135M-Instruct
    python benchmarks/eval_kv.py --dry-run                       a random model and tiny sizes: does it run?

One process, one thread, fp32. Every type of cache is asked the same: losses of windows of the documentation that
comes with Python, and facts that were planted in another such text, whose numbers have to be the model's first choices
digit by digit. Differences of losses are paired token by token.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from longspan.data.texts.facts import collect_keys, draw_facts
from longspan.data.texts.python_corpus import reference_documents
from longspan.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from longspan.infer.kv_types import KvDtype
from longspan.infer.local import LocalAnswerer
from longspan.infer.memory import cache_bytes_per_token
from longspan.infer.requests import Request
from longspan.models.hf import build_model, load_model

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def windows(tokenizer: Tokenizer, texts: Iterator[str], count: int, length: int) -> list[NDArray[np.int64]]:
    """Return the beginnings of the first documents that are long enough."""
    found: list[NDArray[np.int64]] = []
    while len(found) < count:
        ids = np.asarray(tokenizer.encode(next(texts)[: 12 * length]), dtype=np.int64)
        if len(ids) >= length:
            found.append(ids[:length])
    return found


def needles(tokenizer: Tokenizer, text: str, count: int, length: int) -> list[Request]:
    """Return questions on facts that stand evenly spread in one text."""
    facts = draw_facts(np.random.default_rng(0), collect_keys([text], split="test"), count)
    ids = list(tokenizer.encode(text[: 12 * length]))[:length]
    context: list[int] = []
    for number, fact in enumerate(facts):
        start, end = (place * len(ids) // count for place in (number, number + 1))
        context += ids[start:end] + list(tokenizer.encode(f"\n{fact.sentence}\n"))
    asked = []
    for fact in facts:
        question = context + list(tokenizer.encode(f"\n{fact.question}"))
        answer = np.asarray(tokenizer.encode(f" {fact.value}"), dtype=np.int64)
        asked.append(Request("", np.asarray(question, dtype=np.int64), answer_ids=answer))
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model with its tokenizer")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--length", type=int, default=320, help="tokens of a window")
    parser.add_argument("--haystack", type=int, default=640, help="tokens of the text with facts")
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--dry-run", action="store_true", help="a random model, tiny sizes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = (document.text for document in reference_documents() if len(document.text) > 20_000)
    with tempfile.TemporaryDirectory() as folder:
        path = options.model
        if options.dry_run or path is None:
            path = Path(folder)
            options.windows, options.length, options.haystack, options.needles = 1, 20, 40, 2
            tokenizer = train_bpe([next(texts)[:5000]], path, vocab_size=300)
            build_model({**TINY, "vocab_size": tokenizer.vocab_size}, seed=0).save_pretrained(path)
        tokenizer = load_tokenizer(path)
        model = load_model(path, dtype=torch.float32).eval()
    read = windows(tokenizer, texts, options.windows, options.length)
    asked = needles(tokenizer, next(texts), options.needles, options.haystack)
    print(
        "| cache | bytes a token | nats a token | more than whole (standard error) | sd of a token's | facts found |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    whole: NDArray[np.float64] | None = None
    for kind in (None, *cast(tuple[KvDtype, ...], get_args(KvDtype))):
        answerer = LocalAnswerer(model, tokenizer, identity={}, batch_tokens=2048, kv_dtype=kind)
        nll = np.concatenate(answerer.token_nll(read)).astype(np.float64)
        whole = nll if whole is None else whole
        found = dict(answerer.score(asked))
        right = sum(found[n].token_ids.tolist() == each.answer_ids.tolist() for n, each in enumerate(asked))  # type: ignore[union-attr]
        held = cache_bytes_per_token(model, upcasts=True, kv_dtype=kind)
        more = nll - whole
        change = f"{more.mean():+.4f} ({more.std() / len(more) ** 0.5:.4f}) | {more.std():.4f}"
        print(
            f"| {kind or 'fp32'} | {held:,} | {nll.mean():.4f} | {change} | {right} of {len(asked)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
