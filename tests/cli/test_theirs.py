"""What the code of other projects makes of tiny data, the lines of docs/coming-from.md make of it too.

See theirs.py for how their output was obtained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from longspan.data.packed.packed_rows import PackedRows
from longspan.data.plans import mixture
from longspan.data.plans.mixture import MixturePlan
from longspan.data.store import Column, MDSDirectory, MDSWriter, TokenStore
from longspan.data.tokenizer import load_tokenizer
from longspan.eval.prompts import PromptForm
from longspan.eval.released import longllm
from longspan.eval.released.sets import ReleasedTask
from longspan.train.batch import IGNORE_LABEL, collate, total_weight
from longspan.train.recipes import load_recipe
from longspan.train.streams import plan_stage, stage_rows
from tests.cli import theirs

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "theirs.json").read_text())


@pytest.fixture
def place(tmp_path: Path, longspan, monkeypatch: pytest.MonkeyPatch) -> Path:
    """books.jsonl, slimpajama/train, redpajama/ and the tokenizer, and a store of the books."""
    theirs.write_tokenizer(tmp_path / "tokenizer")
    write(tmp_path / "books.jsonl", [{"text": text} for text in theirs.books()])
    write(tmp_path / "slimpajama" / "train" / "part-0.jsonl", theirs.slimpajama())
    for name, texts in theirs.redpajama().items():
        write(tmp_path / "redpajama" / f"{name}.jsonl", [{"text": text} for text in texts])
    monkeypatch.chdir(tmp_path)
    # Documents in the order of the files, as their code got them: ties stay in it.
    monkeypatch.setattr(mixture, "hashed", lambda keys, *_: np.zeros(len(keys), np.uint64))
    return tmp_path


@pytest.fixture
def done(longspan):
    """Run a command line that has to end well."""

    def call(line: str) -> str:
        outcome = longspan(line)
        assert outcome.code == 0, outcome.err
        return outcome.out

    return call


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def packed(folder: str) -> Iterator[list]:
    """Yield ids and bounds of documents, as datatools' rows have them."""
    rows = PackedRows(folder)
    for number in range(rows.num_rows):
        row = rows.row(number)
        bounds = row.cu_seqlens.tolist()
        yield [row.input_ids.tolist(), [list(pair) for pair in pairwise(bounds)]]


def test_datatools(place: Path, done) -> None:
    """`pack` there writes other rows than the line that stands beside it."""
    done("data tokenize books.jsonl --tokenizer tokenizer --out stores/book")
    store = TokenStore("stores/book")
    assert theirs.digest(store.tokens(n).tolist() for n in range(len(store))) == GOLDEN["datatools"]["ids"]
    for number, (options, golden) in enumerate(
        [
            ("--length 64 --specials none --min-tail 64", "pack"),
            ("--length 64 --specials both", "pack bos eos"),
            # `--intact`: a row begins with a document, and what it cuts off its last one is nowhere.
            ("--length 64 --specials none --overflow drop_tail --min-tail 64", "pack intact"),
            ("--length 64 --specials both --overflow drop_tail --min-tail 64", "pack intact bos eos"),
            ("--length 1000 --specials none --overflow drop_tail --min-tail 1000", "pack intact 1000"),
        ]
    ):
        done(f"data pack stores/book {options} --out plan{number} --materialize rows{number}")
        assert theirs.digest(packed(f"rows{number}")) == GOLDEN["datatools"][golden], options
    done(
        "data pack stores/book --strategy split --split-lengths 64,32,8 --length 64 --specials both --out split "
        "--materialize pieces"
    )
    for name, golden in GOLDEN["datatools"]["pack split"].items():
        assert theirs.digest(packed(f"pieces/{name}")) == golden, name
    done(
        "data pack stores/book --strategy split --split-lengths 64,32,8 --length 64 --overflow drop_tail "
        "--specials both --out first --materialize heads"
    )
    for name, golden in GOLDEN["datatools"]["pack intact split bos eos"].items():
        assert theirs.digest(packed(f"heads/{name}-64")) == golden, name


def test_datatools_llama3_model(place: Path, done) -> None:
    """Ids of texts, and ids and masks of conversations, by the tokenizer that datatools carries along."""
    theirs.write_ranks(place / "tokenizer.model")
    write(place / "chats.jsonl", [{"messages": each} for each in theirs.conversations()])
    done("data tokenize books.jsonl --tokenizer tokenizer.model#llama-3 --out stores/book")
    store = TokenStore("stores/book")
    assert (
        theirs.digest(store.tokens(n).tolist() for n in range(len(store)))
        == GOLDEN["datatools"]["llama3.model ids"]
    )
    done(
        "data tokenize chats.jsonl --messages-field messages --chat-template llama-3 "
        "--tokenizer tokenizer.model#llama-3 --out stores/chat"
    )
    chats = TokenStore("stores/chat")
    found = ([chats.tokens(n).tolist(), chats.mask(n).tolist()] for n in range(len(chats)))
    assert theirs.digest(found) == GOLDEN["datatools"]["llama3.model chats"]


def test_datatools_overlap(place: Path, done) -> None:
    """Pieces of one document repeat their tokens as theirs do; across documents theirs repeat other documents'."""
    write(place / "longest.jsonl", [{"text": max(theirs.books(), key=len)}])
    done("data tokenize longest.jsonl --tokenizer tokenizer --out stores/longest")
    for options, golden in (("none", ""), ("bos --mos bos", " mos")):
        out = f"overlap{len(golden)}"
        done(
            f"data pack stores/longest --length 64 --overlap 8 --specials {options} --out plans/{out} "
            f"--materialize {out}"
        )
        assert theirs.digest(packed(out)) == GOLDEN["datatools"][f"pack overlap one document{golden}"]
    done("data tokenize books.jsonl --tokenizer tokenizer --out stores/book")
    for specials, golden in (("none", "pack overlap"), ("both", "pack overlap bos eos")):
        done(
            f"data pack stores/book --length 64 --overlap 8 --overlap-across --specials {specials} "
            f"--out plans/{specials} --materialize {specials}"
        )
        rows = list(packed(specials))
        assert theirs.digest(ids for ids, _ in rows) == GOLDEN["datatools"][golden]
        # Theirs make one document of what is repeated and what follows it; here each stays its own.
        assert all(row.weights.all() for row in map(PackedRows(specials).row, range(len(rows))))


def test_slimpajama_packing(place: Path, done) -> None:
    """Ids, `labels` and `source` of their packed rows."""
    done(
        "data tokenize slimpajama/train --tokenizer tokenizer --source-field meta.redpajama_set_name --out stores/s"
    )
    done(
        "data pack stores/s --length 64 --specials bos --labels next --out plan --materialize rows --format jsonl"
    )
    rows = [
        json.loads(line)
        for path in sorted(Path("rows").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert (
        theirs.digest(
            [row["input_ids"], row["labels"], [[s["source"], s["start"], s["end"]] for s in row["source"]]]
            for row in rows
        )
        == GOLDEN["slimpajama_packing"]
    )


def test_slimpajama_mixture(place: Path, done) -> None:
    """Which documents fill the budgets, with their lengths by characters: tokens would draw others."""
    write(place / "large.jsonl", theirs.large_slimpajama())
    done(
        "data tokenize large.jsonl --tokenizer tokenizer --source-field meta.redpajama_set_name --out stores/s"
    )
    names = {
        "per_source": "--preset slimpajama-per-source",
        "upsample_code_arxiv_book": "--preset slimpajama-upsample-code-arxiv-book",
        "global": "--mode global",
    }
    for name, golden in GOLDEN["slimpajama_mixture"].items():
        mode, ratio = name.split()
        mix = f"data mix stores/s {names[mode]} --tokens 1m --keep-short {ratio}"
        done(f"{mix} --characters-per-token 3.68 --out {mode}{ratio}")
        assert sorted(MixturePlan.load(f"{mode}{ratio}").documents.tolist()) == golden, name
    done(f"{mix} --out tokens")
    assert sorted(MixturePlan.load("tokens").documents.tolist()) != golden


@pytest.mark.parametrize(
    ("name", "changes"),
    [("sft", {}), ("lm", {"objective": "lm"}), ("single", {"objective": "lm", "document_mask": False})],
)
def test_prolong_loss(tmp_path: Path, name: str, changes: dict) -> None:
    """Which token is learnt after which of packed conversations, with and without `--apply_instruct_masks` and
    `--single_seq`, and what `--token_scaled_loss` makes of their losses. Its divisor is a mean over all steps so far,
    which in the first is that of the step."""
    columns = {"indices": "ndarray:uint32", "input_ids": "ndarray:uint32", "mask": "ndarray:uint8"}
    (tmp_path / "rows").mkdir()
    writer = MDSWriter(tmp_path / "rows", [Column(*each) for each in columns.items()], size_limit=1 << 16)
    for row in theirs.packed_chats():
        writer.write(
            {key: np.array(row[key], kind.removeprefix("ndarray:")) for key, kind in columns.items()}
        )
    writer.finish()
    stage = load_recipe("prolong-sft").config.stages[0]
    stream = stage.streams["ultrachat"].model_copy(update={"rows": "rows"})
    small = {"context_length": 24, "batch_tokens": 72, "micro_batch_tokens": 24}
    stage = stage.model_copy(
        update={**small, "streams": {"ultrachat": stream}, "max_epochs": 9999, **changes}
    )
    rows = stage_rows(plan_stage(stage, data_root=tmp_path, seed=0), 0, 3, seed=0)
    pairs, loss = [], 0.0
    for row in rows:
        batch = collate([row])
        found = zip(batch.input_ids.tolist(), batch.labels.tolist())
        pairs.append([[token, label] for token, label in found if label != IGNORE_LABEL])
        for token, label in pairs[-1]:
            logits = [theirs.logit(token, word) for word in range(31)]
            loss += math.log(sum(map(math.exp, logits))) - logits[label]
    assert theirs.digest(pairs) == GOLDEN["prolong"][name]["pairs"]
    assert loss / total_weight(rows) == pytest.approx(GOLDEN["prolong"][name]["loss"], rel=1e-12)


def test_cepe(place: Path, done) -> None:
    """Token files of `tokenize_files.py`, and windows and chunks that the samplers could draw."""
    done("data tokenize redpajama --tokenizer tokenizer --out stores/redpajama")
    done(
        "data pairs stores/redpajama --mode ab --weight arxiv=0.5 --weight book=0.5 --encoder 16 --decoder 16 "
        "--eval-samples 4 --train-samples 20 --format cepe --out ab"
    )
    windows = []
    for part in ("test", "train"):
        for domain in ("arxiv", "book"):
            windows += [
                [*sample["prev_token_ids"].tolist(), *sample["token_ids"].tolist()]
                for sample in MDSDirectory(Path("ab") / part / domain)
            ]
    assert len(windows) >= 20 and set(theirs.short_digests(windows)) <= set(GOLDEN["cepe ab windows"])
    done(
        "data retrieval stores/redpajama --tokenizer tokenizer --weight arxiv=0.5 --weight book=0.5 --samples 2e1 "
        "--num-shards 1 --shard 0 --chunk 16 --out ab"
    )
    lines = [line for path in Path("ab/retrieval").rglob("*.jsonl") for line in path.read_text().splitlines()]
    chunks = [[*each["contents_token_ids"], *each["neighbor_token_ids"]] for each in map(json.loads, lines)]
    assert len(chunks) >= 16 and set(theirs.short_digests(chunks)) <= set(GOLDEN["cepe chunks"])
    done("data convert stores/redpajama --to npy --out npy")
    ours, by_them = [], GOLDEN["cepe documents"]
    for domain in ("arxiv", "book"):
        data = np.load(Path("npy") / domain / f"{domain}.npy")
        count = int(data[0])
        ours += [ids.tolist() for ids in np.split(data[1 + count :], np.cumsum(data[1 : 1 + count]))[:-1]]
    assert theirs.digest(ours) == by_them


def test_cepe_concat(tmp_path: Path, done, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of `sample_mds_concat.py`: of a file's documents end to end, BOS and EOS kept, never of two files."""
    monkeypatch.chdir(tmp_path)
    Path("redpajama/arxiv").mkdir(parents=True)
    theirs_all = set()
    for number in range(100):
        documents = theirs.token_file(number)
        array = np.concatenate([[3], [len(ids) for ids in documents], *documents]).astype(np.int64)
        np.save(f"redpajama/arxiv/{number:03}.npy", array)
        stream = [token for ids in documents for token in ids]
        theirs_all |= {tuple(stream[at : at + 12]) for at in range(0, len(stream) - 11, 4)}
    assert theirs.digest(map(list, theirs_all)) == GOLDEN["cepe concat windows"]
    done(
        "data pairs redpajama --mode concat --weight arxiv=1 --encoder 8 --decoder 4 --eval-samples 5 "
        "--train-samples 100 --format cepe --out concat"
    )
    samples = [*MDSDirectory("concat/test/arxiv"), *MDSDirectory("concat/train/arxiv")]
    found = [(*sample["prev_token_ids"].tolist(), *sample["token_ids"].tolist()) for sample in samples]
    assert len(found) == 105 and set(found) <= theirs_all


def test_longbench(place: Path) -> None:
    """Prompts of the 14 sets as `main.eval_longbench` gives them to the model, whole and without their middle."""
    for number, name in enumerate(GOLDEN["longbench"]):
        write(place / "longbench" / f"{name}.jsonl", theirs.questions(number))
    form = PromptForm(load_tokenizer("tokenizer"), chat_template="llama-3")
    for name, golden in GOLDEN["longbench"].items():
        sets = longllm.open_sets(place, "longbench", [name], max_length=theirs.LONGBENCH_LENGTH, exact=True)
        task = ReleasedTask(sets, form)
        prompts = [task.build(planned).request.prompt_ids for planned in task.plan()]
        assert theirs.digest(np.asarray(ids).tolist() for ids in prompts) == golden, name


def test_longllm_qlora(place: Path) -> None:
    """Ids and masks of conversations and texts, by the settings of the recipe: white space kept, the system turn left
    out, longer conversations left out, longer texts cut to their heads."""
    recipe = load_recipe("qlora-80k").config
    streams = recipe.stages[0].streams
    small = {
        "context_length": theirs.MAX_LENGTH,
        "batch_tokens": theirs.MAX_LENGTH,
        "micro_batch_tokens": theirs.MAX_LENGTH,
    }
    write(place / "chats.jsonl", [{"conversations": each} for each in theirs.conversations()])
    chats, texts = streams["conversations"], streams["redpajama"]
    alone = {"max_length": theirs.MAX_LENGTH, "strategy": "intact"}
    chats = chats.model_copy(
        update={"records": ("chats.jsonl",), "pack": chats.pack.model_copy(update=alone)}
    )
    intact = texts.pack.model_copy(update={"strategy": "intact"})
    texts = texts.model_copy(update={"records": ("books.jsonl",), "pack": intact})
    stage = recipe.stages[0].model_copy(
        update={**small, "streams": {"conversations": chats, "redpajama": texts}}
    )
    plan = plan_stage(stage, data_root=place, seed=0, tokenizer=load_tokenizer(place / "tokenizer"))
    found = {}
    for name, rows in plan.sources.items():
        found[name] = []
        for number in range(rows.num_rows):
            row = rows.row(number)
            end = int(row.cu_seqlens[1])
            found[name].append([row.input_ids[:end].tolist(), row.weights[:end].tolist()])
    assert sorted(found["conversations"]) == sorted(GOLDEN["longllm conversations"])
    assert theirs.digest(ids for ids, _ in found["redpajama"]) == GOLDEN["longllm texts"]
    assert plan.left_out["conversations"]["long"] == 1
    assert plan.left_out["redpajama"]["heads"] == 32
