"""The quickstart's promises: honest splits, controls that differ in one thing, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longspan.core.errors import ConfigError
from longspan.core.records import read_jsonl
from longspan.data.texts.facts import collect_keys
from longspan.data.texts.python_corpus import SPLITS, python_documents, split_of
from longspan.quickstart import QuickstartConfig, controls, load_config, run_quickstart


@pytest.fixture(scope="module")
def documents() -> list:
    return list(python_documents())


def test_no_module_stands_in_two_splits(documents: list) -> None:
    """A docstring in the test split whose source is in the training split would leak the text."""
    splits: dict[str, set[str]] = {}
    for document in documents:
        splits.setdefault(document.group, set()).add(split_of(document.group))
    assert all(len(found) == 1 for found in splits.values())
    sizes = {split: sum(split_of(d.group) == split for d in documents) for split in SPLITS}
    assert all(size > 50 for size in sizes.values())
    assert len({(d.source, d.name) for d in documents}) == len(documents)


def test_lengths_of_the_corpus_are_worth_upsampling(documents: list) -> None:
    """Without long and short documents in one corpus, length upsampling would have nothing to do."""
    code = [len(d.text) for d in documents if d.source == "code"]
    docstrings = [len(d.text) for d in documents if d.source == "docstrings"]
    assert max(code) > 200_000 and max(code) <= 600_000
    assert sum(size < 2000 for size in docstrings) > 0.9 * len(docstrings)


def test_evaluated_keys_were_never_keys_in_training(documents: list) -> None:
    """Otherwise the model could have learnt the values by heart."""
    texts = [d.text for d in documents[:40]]
    keys = [set(collect_keys(texts, split=split)) for split in SPLITS]
    assert all(len(found) > 100 for found in keys)
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_the_shipped_recipes_are_valid_and_take_a_seed(preset: str, tmp_path: Path) -> None:
    """A seed that reaches only a part of the recipe makes runs that look independent and are not."""
    config = load_config(preset, seed=7)  # type: ignore[arg-type]
    config.to_yaml(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.seed == config.pretrain.seed == config.extend.seed == 7
    assert config.evaluation.split == "test"
    assert config.extend.stages[-1].context_length > config.pretrain.stages[-1].context_length
    hf_config = config.pretrain.model.hf_config
    # Other ids in the saved config would let a server end answers at another word than the tokenizer's.
    assert hf_config is not None and (hf_config["bos_token_id"], hf_config["eos_token_id"]) == (0, 1)
    values = config.to_dict()
    values["extend"]["seed"] = 8
    with pytest.raises(ConfigError, match="one seed"):
        QuickstartConfig.from_dict(values)


def test_each_control_changes_one_thing_at_equal_tokens() -> None:
    """A control that trains on fewer tokens, or differs twice, shows nothing."""
    config = load_config("small")
    main, base = config.extend.stages[0], config.pretrain.stages[-1]
    made = {name: control.train.stages[0] for name, control in controls(config).items()}
    assert set(made) == {"ablate_short_rows", "ablate_same_theta", "ablate_no_upsampling"}
    for stage in made.values():
        assert stage.tokens == main.tokens and stage.batch_tokens == main.batch_tokens
        assert stage.lr == main.lr and stage.lr_schedule == main.lr_schedule
    short, theta, plain = (
        made[name] for name in ("ablate_short_rows", "ablate_same_theta", "ablate_no_upsampling")
    )
    assert short.context_length == base.context_length and short.rope == base.rope
    assert theta.model_copy(update={"rope": main.rope}) == main
    assert plain.model_copy(update={"streams": main.streams}) == main
    assert plain.streams["text"].mixture.mode == "none"
    assert all(control.note for control in controls(config).values())


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(out / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_any_phase_it_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """A phase that takes half-written output for whole, or starts over with other random numbers, fails here."""
    config = load_config("tiny", seed=1)
    undisturbed = run_quickstart(tmp_path / "undisturbed", config)
    script = (
        "import sys\nfrom longspan.quickstart import load_config, run_quickstart\n"
        "if __name__ == '__main__':\n    run_quickstart(sys.argv[1], load_config('tiny', seed=1))\n"
    )
    (tmp_path / "go.py").write_text(script)
    out = tmp_path / "disturbed"
    kills = 0
    # Wait for signs of each phase, then kill: corpus, tokenizer, stores, both trainings, evaluation.
    signs = ("corpus", "stores/text", "pretrain/metrics.jsonl", "extend/checkpoints", "records")
    for sign in signs:
        # The same bits need the same number of threads as the undisturbed run in this process.
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        process = subprocess.Popen([sys.executable, str(tmp_path / "go.py"), str(out)], env=environment)
        while process.poll() is None and not (out / sign).exists():
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 4
    disturbed = run_quickstart(out, config)
    assert losses(out) == losses(tmp_path / "undisturbed")
    assert disturbed["needle"] == undisturbed["needle"]
    assert disturbed["ppl"] == undisturbed["ppl"]
    assert json.loads((out / "results.json").read_text())["seed"] == 1
