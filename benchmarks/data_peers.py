"""The peers' side of benchmarks/data.py: runs in an environment of its own and imports nothing of longspan.

python data_peers.py fastokens-tokenize ARGUMENTS...   datatools' tokenize with fastokens patched in
python data_peers.py datatrove FOLDER TOKENIZER OUT    JsonlReader -> DocumentTokenizer
python data_peers.py cepe FOLDER TOKENIZER OUT         one int64 .npy for each file, as CEPE writes them
python data_peers.py encode FOLDER TOKENIZER           tokenizers' encode, one document after another
python data_peers.py digest KIND OUT [EOS]             documents, tokens and SHA-256 of the ids as uint32
"""

import hashlib
import json
import runpy
import struct
import sys
from pathlib import Path

CEPE_BATCH = 10
BOS, EOS = 0, 1


def fastokens_tokenize(*arguments: str) -> None:
    import fastokens

    fastokens.patch_transformers()
    sys.argv[1:] = arguments
    runpy.run_module("datatools.scripts.tokenize", run_name="__main__")


def datatrove(folder: str, tokenizer: str, out: str) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        JsonlReader(folder, glob_pattern="*.jsonl"),
        DocumentTokenizer(
            out, tokenizer_name_or_path=f"{tokenizer}/tokenizer.json", eos_token=None, shuffle_documents=False
        ),
    ]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{out}/logs").run()


def cepe(folder: str, tokenizer: str, out: str) -> None:
    """Write [n][lengths of n documents][their tokens], each document BOS + ids + EOS."""
    import numpy as np
    from transformers import AutoTokenizer

    encoder = AutoTokenizer.from_pretrained(tokenizer)
    Path(out).mkdir(parents=True)
    for path in sorted(Path(folder).glob("*.jsonl")):
        documents, batch = [], []

        def encode(texts: list[str], documents: list[list[int]] = documents) -> None:
            for ids in encoder(texts, add_special_tokens=False)["input_ids"]:
                documents.append([BOS, *ids, EOS])

        with path.open(encoding="utf-8") as file:
            for line in file:
                batch.append(json.loads(line)["text"])
                if len(batch) == CEPE_BATCH:
                    encode(batch)
                    batch = []
        if batch:
            encode(batch)
        flat = [len(documents), *map(len, documents)]
        for ids in documents:
            flat.extend(ids)
        np.save(f"{out}/{path.stem}.npy", np.array(flat))


def encode(folder: str, tokenizer: str) -> None:
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    num_documents, num_tokens, digest = 0, 0, hashlib.sha256()
    for path in sorted(Path(folder).glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                ids = encoder.encode(json.loads(line)["text"], add_special_tokens=False).ids
                digest.update(struct.pack(f"<{len(ids)}I", *ids))
                num_documents, num_tokens = num_documents + 1, num_tokens + len(ids)
    print(json.dumps({"documents": num_documents, "tokens": num_tokens, "sha256": digest.hexdigest()}))


def digest(kind: str, out: str) -> None:
    """Print what a peer's output holds; BOS and EOS that the CEPE scheme adds are left out."""
    import numpy as np

    num_documents, num_tokens, found = 0, 0, hashlib.sha256()

    def add(ids: np.ndarray) -> None:
        nonlocal num_documents, num_tokens
        num_documents, num_tokens = num_documents + 1, num_tokens + len(ids)
        found.update(np.ascontiguousarray(ids, "<u4").tobytes())

    if kind == "datatools":
        from datatools import load

        for item in load(out):
            add(item["input_ids"])
    elif kind == "datatrove":
        for path in sorted(Path(out).glob("*.ds")):
            flat = np.fromfile(path, "<u2")
            start = 0
            for end in np.fromfile(f"{path}.index", "<u8").astype(np.int64).tolist():
                add(flat[start:end])
                start = end
    elif kind == "cepe":
        for path in sorted(Path(out).glob("*.npy")):
            flat = np.load(path)
            count = int(flat[0])
            start = 1 + count
            for length in flat[1:start].tolist():
                add(flat[start + 1 : start + length - 1])
                start += length
    print(json.dumps({"documents": num_documents, "tokens": num_tokens, "sha256": found.hexdigest()}))


COMMANDS = {
    "fastokens-tokenize": fastokens_tokenize,
    "datatrove": datatrove,
    "cepe": cepe,
    "encode": encode,
    "digest": digest,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
