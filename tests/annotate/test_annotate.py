"""What stands in an annotated store, against a direct forward pass; shards, kills and mistakes."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251  what others write
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.annotate.config import AnnotateConfig
from longspan.annotate.job import shard_range
from longspan.annotate.merge import merge
from longspan.annotate.run import annotate, estimate_job, shard_folder
from longspan.annotate.sources import cepe_folder, open_source
from longspan.core.errors import ArgumentError, ConfigError, DataError
from longspan.data.jobs import ArrayJob
from longspan.data.packed.materialize import materialize
from longspan.data.packed.packed_rows import PackedRows
from longspan.data.plans.mixture import plan_mixture
from longspan.data.plans.mixture_config import MixtureConfig
from longspan.data.plans.pack_config import PackConfig
from longspan.data.plans.packing import PAD_DOCUMENT, PackPlan, plan_packing
from longspan.data.rows.annotations import (
    Annotations,
    TaughtRows,
    read_annotation_manifest,
    seal_annotations,
    topk_columns,
    write_annotation_shard,
)
from longspan.data.rows.loader import RowLoader
from longspan.data.store import Column, MDSDirectory, MDSWriter, TokenStore
from longspan.models.hf import build_model, load_model, save_model
from longspan.models.lora import LoraConfig, apply_lora, save_adapter
from tests.annotate.conftest import MODEL, VOCABULARY, Inputs

K = 7


def spec_of(inputs: Inputs, data: Path, **changes: Any) -> AnnotateConfig:
    values = {
        "teacher": {"model": str(inputs.model), "batch_tokens": 70},
        "data": str(data),
        "k": K,
        "piece_tokens": 100,
    }
    return AnnotateConfig.from_dict({**values, **changes}, where="test")


def direct(model: Any, ids: np.ndarray) -> torch.Tensor:
    """Logarithms of all masses after each token of one document, by plain transformers."""
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float().log_softmax(1)


@pytest.fixture(scope="session")
def plain(inputs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(inputs.model, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def taught(inputs):
    """Annotations of the plan's rows, which hold padding and several documents."""
    out = inputs.root / "taught"
    assert annotate(spec_of(inputs, inputs.plan), out).missing == 0
    return Annotations(out)


def compare(known, at: slice, ids: np.ndarray, plain) -> None:
    """Entry t must be the direct prediction after token t."""
    wanted = direct(plain, ids).topk(known.ids.shape[1], 1)
    np.testing.assert_allclose(known.logprobs[at], wanted.values, atol=6e-3)
    assert (known.ids[at, 0] == wanted.indices[:, 0].numpy()).all()


def test_row_i_entry_t_is_the_prediction_after_token_t(inputs, taught, plain):
    """The alignment that distillation rests on: an entry too early or late, a document that sees the one before."""
    loader = RowLoader([TokenStore(inputs.store)], PackPlan.load(inputs.plan))
    assert len(taught) == loader.num_rows
    for index in range(loader.num_rows):
        row, known = loader.row(index), taught.row(index)
        for number, document in enumerate(row.documents):
            at = slice(int(row.cu_seqlens[number]), int(row.cu_seqlens[number + 1]))
            if document == PAD_DOCUMENT:
                assert (known.logprobs[at] == -np.inf).all() and (known.tail[at] == 0).all()
            else:
                compare(known, at, row.input_ids[at], plain)
        masses = np.exp(known.logprobs.astype(np.float64)).sum(1) + np.exp(known.tail.astype(np.float64))
        assert np.abs(masses - 1).max() <= 1e-3


def test_columns_and_manifest(inputs, taught):
    """Other tools read the columns by these names and types."""
    folder = MDSDirectory(taught.path)
    names = {column.name: column.encoding for column in folder.shards[0].columns}
    assert names == {
        "length": "int",
        "row_digest": "int",
        "tail_logprob": "ndarray:float16",
        "topk_ids": "ndarray:uint16",
        "topk_logprobs": "ndarray:float16",
    }
    assert folder[0]["topk_ids"].shape == (32, K)
    assert len(folder.shards) > 1
    manifest = taught.manifest
    source = RowLoader([TokenStore(inputs.store)], PackPlan.load(inputs.plan))
    assert manifest.source["fingerprint"] == source.fingerprint
    assert (manifest.k, manifest.dtype, manifest.vocab_size) == (K, "float16", VOCABULARY)
    assert manifest.tokens == 32 * source.num_rows
    assert len(manifest.teacher["fingerprint"]) == 16


def test_documents_of_a_store(inputs, plain, tmp_path):
    store = TokenStore(inputs.store)
    annotate(spec_of(inputs, inputs.store), tmp_path / "out")
    found = Annotations(tmp_path / "out")
    assert found.manifest.kind == "documents" and len(found) == len(store)
    for document in (0, 7, 23):
        compare(found.row(document), slice(None), store.tokens(document), plain)


def test_the_teacher_reads_documents_from_bos_as_the_student_does(inputs, plain, tmp_path, caplog):
    """The student's documents begin with BOS (specials: auto), and the teacher had read other text."""
    shutil.copytree(inputs.store, tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "longspan.json").read_text())
    manifest["tokenizer"]["adds_bos"] = True
    (tmp_path / "store" / "longspan.json").write_text(json.dumps(manifest))
    store, bos = TokenStore(tmp_path / "store"), manifest["tokenizer"]["bos_id"]
    annotate(spec_of(inputs, tmp_path / "store"), tmp_path / "out")
    found = Annotations(tmp_path / "out")
    for document in (0, 7, 23):
        wanted = direct(plain, np.concatenate([[bos], store.tokens(document)]))[1:].topk(K, 1)
        np.testing.assert_allclose(found.row(document).logprobs, wanted.values, atol=6e-3)
    documents = np.arange(len(store), dtype=np.uint32)
    for specials in ({"specials": "bos", "bos_id": bos}, {}):
        plan = plan_packing(PackConfig(length=12, strategy="concat", **specials), store.lengths, documents, 0)
        caplog.clear()
        TaughtRows(RowLoader([store], plan), [found], stores=[store])
        assert ("the student reads it without BOS" in caplog.text) == (not specials)


def test_rows_that_are_packed_already(inputs, taught, tmp_path):
    materialize(inputs.plan, tmp_path / "rows")
    annotate(spec_of(inputs, tmp_path / "rows"), tmp_path / "out")
    found = Annotations(tmp_path / "out")
    for index in (0, len(found) - 1):
        for ours, theirs in zip(found.row(index), taught.row(index)):
            np.testing.assert_allclose(ours, theirs, atol=4e-3)
    rows = TaughtRows(PackedRows(tmp_path / "rows"), [found])
    assert rows.row(1).teacher is not None


@pytest.mark.parametrize("mass", [0.5, 1.0])
def test_as_many_words_as_hold_a_mass(inputs, taught, tmp_path, mass):
    """The kept words are the first of the k, and what was dropped is in the tail; padding has none."""
    annotate(spec_of(inputs, inputs.plan, mass=mass), tmp_path / "out")
    found = Annotations(tmp_path / "out")
    words = 0
    for index in range(len(found)):
        ours, whole = found.row(index), taught.row(index)
        held = np.exp(ours.logprobs.astype(np.float64)).sum(1)
        np.testing.assert_allclose(held + np.exp(ours.tail.astype(np.float64)), 1, atol=1e-3)
        kept = (ours.logprobs > -np.inf).sum(1)
        words += int(kept.sum())
        padding = whole.logprobs[:, 0] == -np.inf
        assert (kept[padding] == 0).all() and (kept[~padding] >= 1).all()
        enough = ~padding & (kept < K)
        assert (held[enough] >= mass - 2e-3).all()
        without_last = held - np.exp(ours.logprobs[np.arange(len(kept)), np.maximum(kept - 1, 0)])
        assert (without_last[~padding] < mass).all()
        assert (ours.ids[~padding, 0] == whole.ids[~padding, 0]).all()
    assert words == found.manifest.words


def test_shards_join_to_the_whole(inputs, taught, tmp_path):
    """Each row once, in the order of the plan, whichever order the shards are named in."""
    parts = []
    for number in (2, 0, 1):
        part = ArrayJob(number, 3)
        out = shard_folder(tmp_path / "out", part)
        annotate(spec_of(inputs, inputs.plan), out, shard=part)
        parts.append(out)
    with pytest.raises(DataError, match="a shard is missing"):
        merge(parts[:2], tmp_path / "out")
    with pytest.raises(DataError, match="hold the same rows"):
        merge([*parts, parts[0]], tmp_path / "out")
    merge(parts, tmp_path / "out")
    merge(parts, tmp_path / "out")  # again: it is kept
    found = Annotations(tmp_path / "out")
    assert found.manifest.fingerprint == taught.manifest.fingerprint
    assert len(found) == len(taught)
    for index in range(len(found)):
        for ours, theirs in zip(found.row(index), taught.row(index)):
            np.testing.assert_allclose(ours, theirs, atol=4e-3)
    rows = RowLoader([TokenStore(inputs.store)], PackPlan.load(inputs.plan))
    with pytest.raises(DataError, match="is a part of"):
        TaughtRows(rows, [Annotations(parts[0])])
    annotate(spec_of(inputs, inputs.plan, k=3), tmp_path / "other-1", shard=ArrayJob(1, 3))
    with pytest.raises(DataError, match="not of the same annotations"):
        merge([parts[0], parts[1], tmp_path / "other-1"], tmp_path / "third")


def test_a_shard_that_was_not_copied_whole_is_not_joined(inputs, tmp_path):
    """A lost file was a traceback, and a truncated one was linked into the whole without a word."""
    parts = [tmp_path / "out-0", tmp_path / "out-1"]
    for number, out in enumerate(parts):
        annotate(spec_of(inputs, inputs.plan), out, shard=ArrayJob(number, 2))
    file = parts[1] / "shard.00000.mds"
    os.truncate(file, 100)
    with pytest.raises(DataError, match="is not whole") as error:
        merge(parts, tmp_path / "out")
    assert "has 100 bytes" in str(error.value)
    file.unlink()
    with pytest.raises(DataError, match="is lost"):
        merge(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ranges_of_shards():
    """Every row in one shard, none empty, about as many tokens in each."""
    lengths = np.array([1, 1, 1, 97, 50, 50])
    assert [shard_range(lengths, ArrayJob(number, 2)) for number in range(2)] == [(0, 3), (3, 6)]
    for count in range(1, 7):
        ranges = [shard_range(lengths, ArrayJob(number, count)) for number in range(count)]
        assert [first for first, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == 6 and all(first < stop for first, stop in ranges)
    with pytest.raises(ArgumentError, match="fewer rows than shards"):
        shard_range(lengths, ArrayJob(0, 7))


def killed_after(inputs: Inputs, out: Path, replaces: int) -> int:
    """Annotate shard 0 of 2 in a forked process that ends with SIGKILL at its n-th rename; return how it ended."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            left, rename = [replaces], os.replace

            def count(*args: Any, **kwargs: Any) -> None:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                rename(*args, **kwargs)

            os.replace = count  # type: ignore[assignment]
            annotate(spec_of(inputs, inputs.plan), out, shard=ArrayJob(0, 2))
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_killed_shard_goes_on_without_a_row_twice(inputs, taught, tmp_path):
    """Killed at renames (a piece's file, its mark, index, manifest, the folder itself), run again until it ends."""
    out = tmp_path / "out-0"
    moments = 0
    while (ended := killed_after(inputs, out, moments % 3 + 1)) != 0:
        assert ended == -signal.SIGKILL
        moments += 1
        assert moments < 60
    assert moments > 2
    found = Annotations(out)
    first, stop = shard_range(np.full(len(taught), 32), ArrayJob(0, 2))
    assert (found.manifest.first, found.manifest.stop) == (first, stop) and len(found) == stop
    for index in range(stop):
        for ours, theirs in zip(found.row(index), taught.row(index)):
            np.testing.assert_allclose(ours, theirs, atol=4e-3)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["index.json", "longspan.json", *(piece["file"] for piece in found.manifest.pieces)]
    )


def test_jobs_that_share_a_folder(inputs, taught, tmp_path):
    """Jobs of an array: the last one makes the whole, and the same bytes as one alone."""
    spec, out = spec_of(inputs, inputs.plan), tmp_path / "out"
    first = annotate(spec, out, share=ArrayJob(0, 2))
    assert first.missing > 0 and not out.exists()
    assert annotate(spec, out, share=ArrayJob(1, 2)).missing == 0
    assert len(Annotations(out)) == len(taught)


def test_rows_with_their_teacher(inputs, taught):
    """What the loader gives to training, and that rows of another plan are refused."""
    store = TokenStore(inputs.store)
    loader = RowLoader([store], PackPlan.load(inputs.plan))
    rows = TaughtRows(loader, [taught])
    assert rows.fingerprint != loader.fingerprint and rows.num_rows == loader.num_rows
    row = rows.row(1)
    np.testing.assert_array_equal(row.teacher.logprobs, taught.row(1).logprobs)
    other = PackConfig(length=32, strategy="concat")
    plan = plan_packing(other, store.lengths, np.arange(len(store), dtype=np.uint32), 0)
    with pytest.raises(DataError, match="annotated for other rows"):
        TaughtRows(RowLoader([store], plan), [taught])


@pytest.mark.parametrize("specials", [{}, {"specials": "both", "bos_id": 1, "eos_id": 2}])
def test_documents_follow_the_spans_of_a_plan(inputs, tmp_path, specials):
    """A document that is cut: each piece has the predictions of its own tokens, and BOS and EOS have none."""
    store = TokenStore(inputs.store)
    annotate(spec_of(inputs, inputs.store), tmp_path / "out")
    found = Annotations(tmp_path / "out")
    plan = plan_packing(
        PackConfig(length=12, strategy="concat", **specials),
        store.lengths,
        np.arange(len(store), dtype=np.uint32),
        0,
    )
    rows = TaughtRows(RowLoader([store], plan), [found], stores=[store])
    seen = 0
    for index in range(rows.num_rows):
        row = rows.row(index)
        starts = plan.span_start[plan.row_offsets[index] : plan.row_offsets[index + 1]]
        for number, (document, start) in enumerate(zip(row.documents.tolist(), starts.tolist())):
            begin, end = int(row.cu_seqlens[number]), int(row.cu_seqlens[number + 1])
            known = found.row(document)
            for place in range(begin, end):
                token = place - begin + start - plan.spec.num_bos
                if not 0 <= token < len(known.tail):
                    assert (row.teacher.logprobs[place] == -np.inf).all()
                    continue
                assert row.input_ids[place] == store.tokens(document)[token]
                np.testing.assert_array_equal(row.teacher.ids[place], known.ids[token])
                np.testing.assert_array_equal(row.teacher.logprobs[place], known.logprobs[token])
                seen += 1
    assert seen > 100


PAIRS = {"encoder_tokens": 5, "decoder_tokens": 6}


def pairs_spec(inputs: Inputs, **windows: Any) -> AnnotateConfig:
    return spec_of(inputs, inputs.pairs / "arxiv", pairs={**PAIRS, **windows})


def test_cepe_columns(inputs, plain, tmp_path):
    """Row i is the mass after decoder token i, given the encoder's last tokens; the last column is the rest."""
    annotate(pairs_spec(inputs), tmp_path / "out")
    pairs, found = MDSDirectory(inputs.pairs / "arxiv"), MDSDirectory(tmp_path / "out")
    assert len(found) == len(pairs) == 6
    for sample, target in zip(pairs, found):
        probs, index = target["target_prob"], target["target_index"]
        assert (probs.dtype, probs.shape) == (np.float16, (6, K + 1))
        assert (index.dtype, index.shape) == (np.int32, (6, K))
        ids = np.concatenate([sample["prev_token_ids"][-5:], sample["token_ids"][:6]])
        wanted = direct(plain, ids)[5:].exp()
        top = wanted.topk(K, 1)
        np.testing.assert_allclose(probs[:, :K], top.values, atol=1e-3)
        assert (index[:, 0] == top.indices[:, 0].numpy()).all()
        np.testing.assert_allclose(probs.astype(np.float64).sum(1), 1, atol=1e-3)


def test_cepe_pickles(inputs, tmp_path):
    """Windows as CEPE's own code writes them, int64 and pickled: on request, with the same result."""
    columns = [Column("domain", "str"), Column("prev_token_ids", "bytes"), Column("token_ids", "bytes")]
    folder = tmp_path / "theirs"
    folder.mkdir()
    writer = MDSWriter(folder, columns, size_limit=1 << 20)
    for sample in MDSDirectory(inputs.pairs / "arxiv"):
        arrays = {name: sample[name].astype(np.int64) for name in ("prev_token_ids", "token_ids")}
        writer.write({"domain": "arxiv", **{name: pickle.dumps(array) for name, array in arrays.items()}})
    writer.finish()
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index.replace('"bytes", "bytes"', '"pkl", "pkl"'))
    with pytest.raises(DataError, match="--allow-pickle"):
        annotate(spec_of(inputs, folder, pairs=PAIRS), tmp_path / "refused")
    annotate(spec_of(inputs, folder, pairs={**PAIRS, "allow_pickle": True}), tmp_path / "out")
    annotate(pairs_spec(inputs), tmp_path / "plain")
    for found, wanted in zip(MDSDirectory(tmp_path / "out"), MDSDirectory(tmp_path / "plain")):
        assert np.array_equal(found["target_prob"], wanted["target_prob"])


def test_cepe_without_an_encoder(inputs, plain, tmp_path):
    """0 tokens of the encoder are none, not all: what a slice [-0:] would give."""
    annotate(pairs_spec(inputs, encoder_tokens=0), tmp_path / "out")
    sample = MDSDirectory(inputs.pairs / "arxiv")[0]
    wanted = direct(plain, sample["token_ids"][:6]).exp().topk(K, 1).values
    np.testing.assert_allclose(MDSDirectory(tmp_path / "out")[0]["target_prob"][:, :K], wanted, atol=1e-3)


def test_cepe_retrieval(inputs, plain, tmp_path):
    """The first passages stand before the decoder's tokens, in their order, end to end."""
    retrieval = str(inputs.retrieval / "arxiv")
    annotate(pairs_spec(inputs, retrieval=retrieval, retrieval_k=2), tmp_path / "out")
    pairs, retrieved = MDSDirectory(inputs.pairs / "arxiv"), MDSDirectory(inputs.retrieval / "arxiv")
    for number in range(6):
        before = retrieved[number]["retrieved_token_ids"][:2].reshape(-1)
        ids = np.concatenate([before, pairs[number]["token_ids"][:6]])
        wanted = direct(plain, ids)[10:].exp().topk(K, 1).values
        found = MDSDirectory(tmp_path / "out")[number]["target_prob"]
        np.testing.assert_allclose(found[:, :K], wanted, atol=1e-3)
    with pytest.raises(DataError, match="too few passages"):
        annotate(pairs_spec(inputs, retrieval=retrieval, retrieval_k=4), tmp_path / "more")


def test_cepe_names(inputs):
    """CEPE's training reads these folders by their names."""
    windows = pairs_spec(inputs).pairs
    folder = cepe_folder(inputs.pairs / "arxiv", windows, "some/llama")
    assert folder == inputs.root / "pairs-logits-enc5-dec6-llama"
    retrieval = pairs_spec(inputs, retrieval=str(inputs.retrieval / "arxiv"), retrieval_k=2).pairs
    folder = cepe_folder(inputs.pairs / "arxiv", retrieval, "some/llama")
    assert folder == inputs.root / "retrieved-ret_k2-dec6-llama"


def test_the_estimate_is_what_is_written(inputs, taught, tmp_path):
    """Bytes said before against bytes on disk; and fewer words save."""
    found = estimate_job(spec_of(inputs, inputs.plan))
    size = sum(piece["bytes"] for piece in taught.manifest.pieces)
    # Headers of shards and rows are not counted; they are large beside rows of 32 tokens.
    assert 0.9 * found.num_bytes < size < 1.3 * found.num_bytes + 4000
    assert found.tokens == taught.manifest.tokens
    by_name = {option.name: option for option in found.options}
    assert by_name["--k 7"].bytes_per_token == 7 * 4 + 2
    assert by_name["--k 7 --mass 0.9"].words <= by_name["--k 7 --mass 0.99"].words <= 7
    assert by_name["--k 7 --dtype float32"].saves < 0
    annotate(spec_of(inputs, inputs.plan, mass=0.5), tmp_path / "half")
    words = read_annotation_manifest(tmp_path / "half").words
    real = int(sum((taught.row(i).logprobs[:, 0] > -np.inf).sum() for i in range(len(taught))))
    said = estimate_job(spec_of(inputs, inputs.plan, mass=0.5)).options[0].words
    assert said == pytest.approx(words / real, rel=0.05)


def test_other_settings_do_not_go_on(inputs, taught):
    """Half of one annotation and half of another must never make a whole."""
    with pytest.raises(DataError, match="other settings") as error:
        annotate(spec_of(inputs, inputs.plan, k=3), taught.path)
    assert "k 7" in str(error.value) and "k 3" in str(error.value)
    assert annotate(spec_of(inputs, inputs.plan), taught.path).missing == 0


def test_weights_of_another_type_are_another_teacher(inputs, tmp_path):
    """A job in bfloat16 went on with, and was joined to, rows of the same weights in float32."""
    in_bfloat16 = {"model": str(inputs.model), "dtype": "bfloat16"}
    annotate(spec_of(inputs, inputs.plan), tmp_path / "out-0", shard=ArrayJob(0, 2))
    annotate(spec_of(inputs, inputs.plan, teacher=in_bfloat16), tmp_path / "out-1", shard=ArrayJob(1, 2))
    with pytest.raises(DataError, match="not of the same annotations") as error:
        merge([tmp_path / "out-0", tmp_path / "out-1"], tmp_path / "out")
    assert "bfloat16" in str(error.value) and "float32" in str(error.value)
    with pytest.raises(DataError, match="other settings"):
        annotate(spec_of(inputs, inputs.plan, teacher=in_bfloat16), tmp_path / "out-0", shard=ArrayJob(0, 2))


def test_a_teacher_that_predicts_no_numbers_is_refused(inputs, tmp_path):
    """NaN was written as it came, and the student's loss was NaN weeks later."""
    model = load_model(inputs.model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    save_model(model, tmp_path / "broken")
    with pytest.raises(DataError, match="not a number"):
        annotate(spec_of(inputs, inputs.plan, teacher={"model": str(tmp_path / "broken")}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks
@pytest.mark.parametrize("written_by", ["longspan", "peft"])
def test_a_folder_of_an_adapter_is_read_beside_its_base(inputs, tmp_path, written_by):
    """The base's own predictions, or an adapter twice as strong, against peft's forward pass."""
    import peft
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "adapter"
    if written_by == "longspan":
        model = apply_lora(load_model(inputs.model), LoraConfig(rank=4, alpha=12), seed=1)
        randomise(model)
        save_adapter(model, folder, base=inputs.model)
    else:
        own = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(inputs.model), own)
        randomise(model)
        model.save_pretrained(folder)
    spec = spec_of(inputs, inputs.store, k=VOCABULARY, teacher={"model": str(folder)}, dtype="float32")
    annotate(spec, tmp_path / "out")
    known = Annotations(tmp_path / "out").row(3)
    ids = open_source(inputs.store).row(3).ids
    beside = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs.model), folder).eval()
    wanted = direct(beside, ids).gather(1, torch.from_numpy(known.ids).long())
    np.testing.assert_allclose(known.logprobs, wanted, atol=1e-4)
    with beside.disable_adapter():
        alone = direct(beside, ids).gather(1, torch.from_numpy(known.ids).long())
    assert np.abs(known.logprobs - alone.numpy()).max() > 0.1


def randomise(model: torch.nn.Module) -> None:
    """Give an adapter, which begins as nothing, something to say."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row | {"topk_offsets": row["topk_offsets"] + np.uint32(row["topk_offsets"] > 0)},
        lambda row: row | {"topk_logprobs": row["topk_logprobs"][:-1]},
        lambda row: row | {"topk_ids": row["topk_ids"][None]},
    ],
)
def test_words_that_do_not_fit_their_tokens_are_a_message(inputs, tmp_path, change):
    """Offsets beyond the last word, or columns of different lengths, ended in an error of numpy."""
    annotate(spec_of(inputs, inputs.store, mass=0.9), tmp_path / "whole")
    manifest = read_annotation_manifest(tmp_path / "whole")
    columns = topk_columns(ragged=True, vocab_size=VOCABULARY, dtype="float16")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    row = change(dict(MDSDirectory(tmp_path / "whole")[0]))
    piece = {**write_annotation_shard(damaged, 0, columns, [row], 1), "tokens": 1, "words": 1}
    seal_annotations(damaged, columns, manifest._replace(rows=1, pieces=[piece]))
    with pytest.raises(DataError, match="is damaged"):
        Annotations(damaged).row(0)


def test_refuses_what_does_not_fit(inputs, tmp_path):
    with pytest.raises(ArgumentError, match="so many words"):
        annotate(spec_of(inputs, inputs.plan, k=VOCABULARY + 1), tmp_path / "out")
    save_model(build_model({**MODEL, "vocab_size": 200}, seed=0), tmp_path / "small")
    with pytest.raises(DataError, match="another vocabulary"):
        annotate(spec_of(inputs, inputs.plan, teacher={"model": str(tmp_path / "small")}), tmp_path / "out")
    with pytest.raises(DataError, match="a token that the teacher does not know"):
        spec = spec_of(inputs, inputs.pairs / "book", pairs=PAIRS, teacher={"model": str(tmp_path / "small")})
        annotate(spec, tmp_path / "out")
    short = {**MODEL, "max_position_embeddings": 8}
    save_model(build_model(short, seed=0), tmp_path / "short")
    for data, teacher in ((inputs.plan, "short"), (inputs.store, "short")):
        with pytest.raises(ConfigError, match="longer than the teacher's context"):
            annotate(spec_of(inputs, data, teacher={"model": str(tmp_path / teacher)}), tmp_path / "out")
    reaches = {"model": str(tmp_path / "short"), "context": 64}
    assert annotate(spec_of(inputs, inputs.plan, teacher=reaches), tmp_path / "out").missing == 0


def test_refuses_another_tokenizer(inputs, tmp_path):
    """As many words, but other ones: ids would be in range and mean something else."""
    from longspan.data.tokenizer import train_bpe

    train_bpe(["completely different words here"] * 9, tmp_path / "tokenizer", vocab_size=VOCABULARY)
    save_model(load_model(inputs.model), tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(DataError, match="another tokenizer"):
        annotate(spec_of(inputs, inputs.plan, teacher={"model": str(tmp_path / "model")}), tmp_path / "out")


def test_refuses_what_is_no_rows(inputs, taught, tmp_path):
    store = TokenStore(inputs.store)
    plan_mixture(MixtureConfig(mode="none"), store.lengths, 0).save(
        tmp_path / "mixture", stores=[inputs.store]
    )
    with pytest.raises(DataError, match="not how they stand in rows"):
        open_source(tmp_path / "mixture")
    with pytest.raises(DataError, match="no rows that a teacher could read"):
        open_source(taught.path)
    with pytest.raises(DataError, match="lacks columns"):
        annotate(spec_of(inputs, inputs.retrieval / "arxiv", pairs=PAIRS), tmp_path / "out")
    with pytest.raises(DataError, match="lacks columns of a teacher"):
        annotate(pairs_spec(inputs), tmp_path / "cepe")
        Annotations(tmp_path / "cepe")
    with pytest.raises(DataError, match="holds no annotations"):
        Annotations(inputs.store)


@pytest.mark.slow
def test_two_processes_share_the_teacher(inputs, taught, tmp_path):
    """As `--cp 2` starts them; the predictions are those of one."""
    spec = spec_of(inputs, inputs.plan, teacher={"model": str(inputs.model), "cp": 2})
    assert annotate(spec, tmp_path / "out").missing == 0
    for index in range(len(taught)):
        for ours, theirs in zip(Annotations(tmp_path / "out").row(index), taught.row(index)):
            np.testing.assert_allclose(ours, theirs, atol=4e-3)


@pytest.mark.slow
def test_several_workers_write_the_same_bytes(inputs, taught, tmp_path):
    from longspan.data.jobs import LocalExecutor

    annotate(spec_of(inputs, inputs.plan), tmp_path / "out", executor=LocalExecutor(2))
    for piece in taught.manifest.pieces:
        assert (tmp_path / "out" / piece["file"]).read_bytes() == (taught.path / piece["file"]).read_bytes()
