"""Score recorded outputs by another rule: from the records alone, without a model.

    rescore("run/records/needle-before.jsonl", "rouge_1", "run/records/needle-before-rouge_1.jsonl")

The new file has the old header with the new scorer, `rescored_from` and a fingerprint of its own. A sample
that had no score has none now, for the same reason. Thoughts that stand before an answer are taken off it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from longspan.api import ServerConfig
from longspan.core.config import Config
from longspan.core.errors import ArgumentError, ConfigError, DataError, RunError
from longspan.core.progress import progress
from longspan.eval.records import EvalRecords, RecordsWriter, header_fingerprint, read_records, sample_id
from longspan.eval.scorers import Scorer, scorer_named
from longspan.eval.summaries import count_no_answer, mean_score
from longspan.infer.thinking import split_thoughts


class RescoreConfig(Config):
    """By which rule recorded answers are scored again."""

    scorer: str
    """Scoring rule (see `eval list`), or judge: a model rates 1-10; or citations: a model says whether the passages
    that an answer of helmet:cite names support it."""
    judge: str | None = None
    """Model that judges: openai:NAME or anthropic:NAME, as in --model. Of citations also a text-to-text model of
    entailment, which is run here: a folder, or a name such as google/t5_xxl_true_nli_mixture (the published one)."""
    data_root: str | None = None
    """Folder of HELMET's data, whose passages the citations name."""
    criteria: Literal["answer", "kamradt"] = "answer"
    """What the judge goes by: how much of the right answer is there, or the published criteria of Kamradt's needle
    test."""
    run_code: bool = False
    """Compile and run on this machine what a model wrote for LongProc's pseudo_to_code, with limits but in no
    sandbox."""
    server: ServerConfig | None = None
    """How the judge's server is asked, as YAML, a YAML file or its address."""

    @pydantic.model_validator(mode="after")
    def _rules_ask_nobody(self) -> RescoreConfig:
        asked = self.judge is not None or self.server is not None
        judges = ("judge", "citations")
        if (asked and self.scorer not in judges) or (self.criteria != "answer" and self.scorer != "judge"):
            raise ConfigError(
                "no judge is asked by this rule", found=f"--scorer {self.scorer}", fix="give --scorer judge"
            )
        if (self.data_root is None) == (self.scorer == "citations"):
            raise ConfigError(
                "--data-root goes with --scorer citations, which reads the passages there",
                found=f"--scorer {self.scorer} {'without it' if self.data_root is None else 'with it'}",
            )
        return self


def rescore(
    records: str | Path,
    scorer: str,
    out: str | Path,
    *,
    used: Mapping[str, Any] | None = None,
    run_code: bool = False,
) -> dict[str, Any]:
    """Write `records` to `out` with the scores of another scorer; return a summary.

    `used`: the settings of the command, for the header. `run_code`: what a model wrote may be run where its score
    takes that, whatever the records say.

    Returns:
        task, label, scorer, records (the new path), samples, scored, unscored and no_answer (reason -> count), mean
        and its 95 % interval.

    Raises:
        ArgumentError: there is no such scorer, `out` is the same file, or the scorer needs a field that the
            samples lack.
        ConfigError: `out` holds something else.
        DataError: `records` holds no samples with expected and given text.
    """
    rule = scorer_named(scorer)
    source = open_for_rescoring(records, out)
    header = rescored_header(source.header, rule.named(), used, higher_is_better=rule.higher_is_better)
    new = [
        rescored(sample, header, rule, run_code=run_code) for sample in source.samples
    ]  # all, or the file is not begun
    with RecordsWriter(out, header) as writer:
        for record in new:
            if record["id"] not in writer.recorded:
                writer.write(record)
        if source.complete:
            writer.finish()
        samples = list(writer.recorded.values())
    return summarise(header, out, samples)


def open_for_rescoring(records: str | Path, out: str | Path) -> EvalRecords:
    """Return the records to score again. Raises as `rescore`."""
    if Path(records).resolve() == Path(out).resolve():
        raise ArgumentError("the scores would be written over their source", found=out, fix="choose another")
    source = read_records(records)
    for sample in source.samples:
        if sample.get("unscored") is None and not {"expected", "output"} <= sample.keys():
            raise DataError(
                f"{records} holds no texts to score",
                found=f"a sample of {source.header.get('task')} with {', '.join(sorted(sample))}",
                allowed="samples with `expected` and `output`",
            )
    return source._replace(samples=[_thoughts_apart(sample) for sample in source.samples])


def _thoughts_apart(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample whose output is the answer alone: older records hold thoughts and marks around it."""
    output = sample.get("output") or ""
    spoken = split_thoughts(output)
    if sample.get("thoughts") or spoken.answer == output:
        return sample
    return {**sample, "output": spoken.answer, "thoughts": spoken.thoughts}


def rescored_header(
    header: Mapping[str, Any],
    scorer: Mapping[str, Any],
    used: Mapping[str, Any] | None = None,
    *,
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """Return the header of the same evaluation by another scorer (name, version, whatever else it says)."""
    changed = {
        **header,
        "params": {**header["params"], "scorer": dict(scorer)},
        "rescored_from": header["fingerprint"],
        "higher_is_better": higher_is_better,
        "settings": used,
    }
    changed["fingerprint"] = header_fingerprint(changed)
    return changed


def rescored(
    sample: Mapping[str, Any], header: Mapping[str, Any], scorer: Scorer, *, run_code: bool = False
) -> dict[str, Any]:
    """Return a recorded sample with the score of `scorer`, or as it is when it has none."""
    score = None
    if sample.get("unscored") is None:
        score = float(scorer.score(sample["expected"], sample["output"], {**sample, "run_code": run_code}))
    return {**sample, "id": sample_id(header, sample["id"]), "score": score}


def write_judged(
    source: EvalRecords,
    header: Mapping[str, Any],
    out: str | Path,
    judged: Callable[[Sequence[dict[str, Any]]], Iterable[dict[str, Any]]],
    *,
    doing: str,
    says: str,
    found: Callable[[], str] | None = None,
) -> list[dict[str, Any]]:
    """Write the samples that `out` does not hold yet as a judge scores them; return all samples of `out`.

    Args:
        judged: yields samples with their scores, as they are judged; those that cannot be now are left out.
        doing: what is done, for the bar.
        says: what the judge says of a sample, in the plural.
        found: tells why samples were left out.

    Raises:
        RunError: some were left out; the same call asks for them again.
    """
    ids = [sample_id(header, sample["id"]) for sample in source.samples]
    with RecordsWriter(out, header) as writer:
        missing = [
            {**sample, "id": id_} for id_, sample in zip(ids, source.samples) if id_ not in writer.recorded
        ]
        with progress(doing, total=len(ids), unit="samples", done=len(ids) - len(missing)) as bar:
            for record in judged(missing):
                writer.write(record)
                bar.advance()
        if left := len(ids) - len(writer.recorded):
            raise RunError(
                f"{left:,} of {len(ids):,} samples were not judged",
                found=None if found is None else found(),
                fix=f"run the same command again: recorded {says} are not asked for again",
            )
        if source.complete:
            writer.finish()
        return [writer.recorded[id_] for id_ in ids]


def summarise(header: Mapping[str, Any], out: str | Path, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what `rescore` returns."""
    unscored = Counter(sample["unscored"] for sample in samples if sample["score"] is None)
    return {
        "task": header["task"],
        "label": header["label"],
        "scorer": header["params"]["scorer"]["name"],
        "records": str(out),
        "samples": len(samples),
        "scored": len(samples) - unscored.total(),
        "unscored": dict(unscored),
        "no_answer": count_no_answer(samples),
        **mean_score(samples),
    }
