"""The text and the tokenizers that benchmarks/data.py measures with, made of what a Linux machine carries.

    python benchmarks/data_corpus.py corpus OUT --megabytes 110 --parts 4
    python benchmarks/data_corpus.py tokenizers CORPUS OUT
    python benchmarks/data_corpus.py grow CORPUS OUT --megabytes 1000

Sources are the standard library, installed packages, package documentation, manual pages and C headers. Which
files are taken, and their order, follows from hashes of their paths, so the same machine gives the same corpus.
Half of the installed packages become one long document each. No text is in the corpus twice, and no document
that spells out a special token: the peers take such text for the token itself.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import string
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<unk>", "<s>", "</s>")
PROSE = (".txt", ".md", ".rst", ".html", ".gz", "copyright", "README")
# Source, share of the corpus, folder, ends of file names.
SOURCES = (
    ("stdlib", 0.22, sysconfig.get_path("stdlib"), (".py",)),
    ("packages", 0.34, sysconfig.get_path("purelib"), (".py", ".md", ".rst")),
    ("docs", 0.18, "/usr/share/doc", PROSE),
    ("manuals", 0.10, "/usr/share/man", (".gz",)),
    ("headers", 0.16, "/usr/include", (".h", ".hpp")),
)
SMALLEST, LARGEST = 200, 4_000_000


def build_corpus(
    out: Path, *, num_bytes: int, num_parts: int, sources: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Write `num_parts` jsonl files of about `num_bytes` of text in all; return documents and bytes by source.

    Every file holds every source. What a source lacks of its share is made up by those that have more.
    """
    seen: set[bytes] = set()
    wanted = [row for row in SOURCES if row[0] in sources]
    streams = {name: _documents(name, Path(root), ends, seen) for name, _, root, ends in wanted}
    taken: list[tuple[bytes, str, str]] = []
    counts = {name: {"documents": 0, "bytes": 0} for name in streams}

    def take(name: str, limit: float) -> None:
        for text in streams[name]:
            size = len(text.encode())
            counts[name]["documents"] += 1
            counts[name]["bytes"] += size
            taken.append((hashlib.sha256(text.encode()).digest(), name, text))
            if counts[name]["bytes"] >= limit:
                return

    for name, share, _, _ in wanted:
        take(name, share * num_bytes)
    for name in streams:
        missing = num_bytes - sum(count["bytes"] for count in counts.values())
        if missing > 0:
            take(name, counts[name]["bytes"] + missing)
    taken.sort()
    out.mkdir(parents=True, exist_ok=True)
    for part in range(num_parts):
        with (out / f"part-{part:02}.jsonl").open("w", encoding="utf-8") as file:
            for _, name, text in taken[part::num_parts]:
                file.write(json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n")
    return counts


def _documents(source: str, root: Path, ends: tuple[str, ...], seen: set[bytes]) -> Iterator[str]:
    """Yield texts of a folder that `seen` has not, in the order of the hashes of their paths."""
    files = [path for path in root.rglob("*") if path.name.endswith(ends) and path.is_file()]
    if source == "stdlib":
        files = [path for path in files if "site-packages" not in path.parts]
    group: Callable[[Path], str] = str
    if source == "packages":
        group = _package_or_file(root)
    keyed = sorted((_order(group(path)), group(path), path) for path in files)
    for _, together in groupby(keyed, key=lambda item: item[1]):
        text = "\n\n".join(filter(None, (_read(path, seen) for _, _, path in together)))
        if text:
            yield text[:LARGEST]


def _package_or_file(root: Path) -> Callable[[Path], str]:
    def group(path: Path) -> str:
        package = path.relative_to(root).parts[0]
        return package if int(_order(package), 16) % 2 else str(path.relative_to(root))

    return group


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _read(path: Path, seen: set[bytes]) -> str | None:
    """Return the text of a file, or None when it is short, long, no UTF-8, seen or spells a special token."""
    try:
        content = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
        text = content.decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    digest = hashlib.sha256(content).digest()
    if not SMALLEST <= len(text) <= LARGEST or digest in seen or any(name in text for name in SPECIALS):
        return None
    seen.add(digest)
    return text


def train_tokenizers(
    corpus: Path, out: Path, *, vocab: int, sentencepiece_vocab: int, num_bytes: int
) -> None:
    """Train both tokenizers on the first `num_bytes` of the corpus: OUT/bytelevel and OUT/sentencepiece."""
    from longspan.data.tokenizer import train_bpe

    texts, size = [], 0
    for text in texts_of(corpus):
        texts.append(text)
        size += len(text)
        if size >= num_bytes:
            break
    train_bpe(texts, out / "bytelevel", vocab_size=vocab, split_digits=False)
    _train_sentencepiece(texts, out / "sentencepiece", sentencepiece_vocab)


def _train_sentencepiece(texts: list[str], out: Path, vocab: int) -> None:
    """Train a BPE laid out like that of Llama 2: spaces are U+2581, unknown characters fall back to bytes.

    Merges are learned within words; the saved tokenizer applies them to whole documents, as Llama 2's does.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    named = ["<unk>", "<s>", "</s>"]
    in_bytes = [f"<0x{value:02X}>" for value in range(256)]
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=named + in_bytes, limit_alphabet=500, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.pre_tokenizer = None
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    content = json.loads(model.to_str())
    # The bytes are ordinary entries: "<0x0A>" written out in a text is six characters.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in named]
    content["pre_tokenizer"] = None
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(content))


def texts_of(corpus: Path) -> Iterator[str]:
    """Yield the texts of a folder of jsonl files, in the order of the files and lines."""
    for path in sorted(corpus.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def grow(corpus: Path, out: Path, *, num_bytes: int) -> None:
    """Write a larger corpus in which words hardly repeat: copies whose letters are moved on in the alphabet.

    Copy 0 is the corpus itself. A tokenizer that remembers words meets new ones in every copy.
    """
    out.mkdir(parents=True, exist_ok=True)
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    written = copy = 0
    while written < num_bytes:
        low, up = copy % 26, copy // 26 % 26
        moved = str.maketrans(lower + upper, lower[low:] + lower[:low] + upper[up:] + upper[:up])
        with (out / f"copy-{copy:03}.jsonl").open("w", encoding="utf-8") as file:
            for text in texts_of(corpus):
                line = json.dumps({"text": text.translate(moved), "source": "text"}, ensure_ascii=False)
                written += len(line.encode()) + 1
                file.write(line + "\n")
                if written >= num_bytes:
                    break
        copy += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("out", type=Path)
    corpus.add_argument("--megabytes", type=float, default=110)
    corpus.add_argument("--parts", type=int, default=4)
    corpus.add_argument("--sources", nargs="+", default=[row[0] for row in SOURCES])
    trained = commands.add_parser("tokenizers")
    trained.add_argument("corpus", type=Path)
    trained.add_argument("out", type=Path)
    trained.add_argument("--vocab", type=int, default=32_000)
    trained.add_argument("--sentencepiece-vocab", type=int, default=16_000)
    trained.add_argument("--megabytes", type=float, default=10)
    grown = commands.add_parser("grow")
    grown.add_argument("corpus", type=Path)
    grown.add_argument("out", type=Path)
    grown.add_argument("--megabytes", type=float, required=True)
    options = parser.parse_args()
    num_bytes = int(options.megabytes * 1e6)
    if options.command == "corpus":
        counts = build_corpus(
            options.out, num_bytes=num_bytes, num_parts=options.parts, sources=options.sources
        )
        print(json.dumps(counts))
    elif options.command == "tokenizers":
        train_tokenizers(
            options.corpus,
            options.out,
            vocab=options.vocab,
            sentencepiece_vocab=options.sentencepiece_vocab,
            num_bytes=num_bytes,
        )
    else:
        grow(options.corpus, options.out, num_bytes=num_bytes)


if __name__ == "__main__":
    main()
