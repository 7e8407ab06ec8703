"""Configs of other trainers become recipes, and no key of them is lost in silence."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.core.config import read_yaml
from longspan.core.errors import ArgumentError, ConfigError, UserError
from longspan.train.config import TrainConfig
from longspan.train.resolve import resolve
from longspan.train.translate import load_tables, translate
from longspan.train.translate.meanings import MEANINGS
from longspan.train.translate.sources import read_source
from longspan.train.translate.tables import flattened

CONFIGS = Path(__file__).parent / "other_trainers"
EXPECTED = read_yaml(CONFIGS / "expected.yaml")
LEAST = {
    "axolotl": {"base_model": "m", "sequence_len": 64, "learning_rate": 1e-4},
    "llama-factory": {"model_name_or_path": "m", "cutoff_len": 64, "learning_rate": 1e-4, "dataset": "d"},
    "trl": {
        "model_name_or_path": "m",
        "max_length": 64,
        "dataset_name": "d.jsonl",
        "packing_strategy": "bfd",
    },
    "ms-swift": {"model": "m", "max_length": 64, "dataset": "d.jsonl", "tuner_type": "lora"},
    "torchtune": {
        "checkpointer": {"checkpoint_dir": "m"},
        "tokenizer": {"max_seq_len": 64},
        "optimizer": {"lr": 1e-4},
        "dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "d.jsonl"},
    },
}
LEAST["axolotl"]["datasets"] = [{"path": "d.jsonl", "type": "chat_template"}]


def written(folder: Path, values: object, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def test_there_are_two_configs_of_each_tool():
    assert len(EXPECTED) == 10
    assert sorted({path.name for path in CONFIGS.iterdir()} - {"expected.yaml"}) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_comes_to_the_recipe_that_says_the_same(name, tmp_path):
    """A setting that goes to the wrong place trains another model and looks right."""
    made = translate(CONFIGS / name, processes=8)
    assert made.recipe == EXPECTED[name]
    tables = load_tables()
    assert made.tool == next(table.name for tool, table in tables.items() if name.startswith(tool))
    # Every key of the file has one note, and what the file does not say is only what the tool has by default.
    table = next(table for table in tables.values() if table.name == made.tool)
    commands = [command for each in tables.values() for command in each.commands]
    keys = flattened(read_source(CONFIGS / name, commands).values, table)
    said = [note.key for note in made.notes if note.kind != "left out there"]
    assert len(said) == len(set(said)) == len(keys)
    # The recipe is one that a dry run takes; model and data need not be at hand.
    resolved = resolve(TrainConfig.from_dict(made.recipe), "recipe.yaml", data_root=tmp_path, gpu="h100")
    assert resolved.processes == 8
    (stage,) = resolved.stages
    assert stage.rows_per_step * stage.context_length == made.recipe["stages"][0]["batch_tokens"]


@pytest.mark.parametrize("tool", load_tables())
def test_tables_use_words_that_are_known(tool):
    """A misspelt meaning would be taken by nobody."""
    table = load_tables()[tool]
    assert set(table.translated.values()) <= set(MEANINGS)
    assert set(table.defaults) <= set(MEANINGS) and set(table.values) <= {*MEANINGS, "sharding"}
    twice = [key for said in table.said for key in said.keys if key in table.translated]
    assert not twice, "a key is both translated and said not to be"
    assert table.page.startswith("https://") and table.differs


def test_every_meaning_is_of_some_tool():
    used = {meaning for table in load_tables().values() for meaning in table.translated.values()}
    assert set(MEANINGS) - used == set()


def test_arguments_of_the_trainer_are_those_of_transformers():
    """The three tools on its trainer take all of TrainingArguments: none may be unknown here."""
    # Importing the class takes seconds.
    source = Path(transformers.__file__).with_name("training_args.py").read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    lines = classes["TrainingArguments"].body
    fields = {each.target.id for each in lines if isinstance(each, ast.AnnAssign)} - {"framework"}
    assert len(fields) > 80
    for tool in ("llama-factory", "trl", "ms-swift"):
        table = load_tables()[tool]
        assert not [name for name in sorted(fields) if not table.knows(name)]
        # Keys with the parts that the trainer has, and those that older releases had.
        assert table.translated.keys() & fields >= {
            "learning_rate",
            "warmup_steps",
            "optim",
            "fsdp",
            "deepspeed",
        }


@pytest.mark.parametrize("tool", LEAST)
@settings(max_examples=10, deadline=None)
@given(
    key=st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=6, max_size=12).map(
        "zz_{}".format
    ),
    value=st.one_of(
        st.booleans(), st.integers(), st.text(max_size=8), st.just({"inner": 1}), st.just([{"a": 1}])
    ),
)
def test_keys_that_nobody_knows_are_reported(tool, key, value, tmp_path_factory):
    """Whatever stands in a file, it is said what became of it."""
    path = written(tmp_path_factory.mktemp("unknown"), {**LEAST[tool], key: value})
    made = translate(path, tool=tool)
    notes = [note for note in made.notes if note.key.startswith(key)]
    assert notes and all(note.kind == "not carried over" for note in notes)
    TrainConfig.from_dict(made.recipe)


@pytest.mark.parametrize("tool", LEAST)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_value_is_translated_or_refused_with_one_message(tool, data, tmp_path_factory):
    """A word where a number belongs is the user's mistake, not a traceback; no key is lost beside it."""
    table = load_tables()[tool]
    plain = sorted(key for key in table.translated if "[" not in key and "." not in key)
    values = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 9), st.floats(0, 2), st.sampled_from(["auto", "x", "8", "{", "1e-4"]),
        st.lists(st.sampled_from(["q_proj", "a/b", 3]), max_size=2), st.just({"stage": 3}),
    )  # fmt: skip
    changed = data.draw(st.dictionaries(st.sampled_from(plain), values, max_size=4))
    path = written(tmp_path_factory.mktemp("values"), {**LEAST[tool], **changed})
    try:
        made = translate(path, tool=tool, processes=4)
    except UserError:
        return
    said = [note.key.partition(".")[0] for note in made.notes]
    assert set(changed) <= set(said)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.yaml", "base_model: [", "not valid YAML"),
        ("a.yaml", "- a\n- b\n", "does not hold settings"),
        ("a.yaml", "", "does not hold settings"),
        ("a.yaml", "base_model: m\nbase_model: n\n", "stands twice"),
        ("a.yaml", "base_model: &a {b: *a}\nsequence_len: 8\n", "holds itself"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", "does not hold settings"),
        ("a.sh", "swift sft --model 'm", "cannot be read"),
        ("a.sh", "swift sft", "no options"),
        ("a.sh", "megatron sft --model m", "runs no command"),
        ("a.sh", "swift sft --model a --model b", "stands twice"),
        ("a.yaml", "colour: red\n", "no tool that longspan knows"),
        ("a.yaml", "learning_rate: 1e-4\nseed: 1\n", "may be a config of"),
        ("a.yaml", "stages: [{name: a}]\nmodel: {path: m}\n", "a recipe of longspan already"),
        ("a.yaml", "base_model: m\nsequence_len: long\nlearning_rate: 1\n", "sequence_len is no number"),
        ("a.yaml", "base_model: m\nsequence_len: 8.5\nlearning_rate: 1\n", "no whole number"),
        ("a.yaml", "base_model: m\nsequence_len: 64\nlearning_rate: 1e-4\n", "its data"),
        ("a.yaml", "sequence_len: 64\nsample_packing: true\nlearning_rate: 1e-4\n", "the model (model.path)"),
    ],
)
def test_a_file_that_is_none_is_one_message(name, text, part, tmp_path):
    with pytest.raises(ConfigError, match=part.replace("(", r"\(").replace(")", r"\)")):
        translate(written(tmp_path, text, name))


def test_files_that_cannot_be_read_and_tools_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        translate(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        translate(tmp_path / "b.yaml")
    with pytest.raises(ArgumentError, match="axolotl, llama-factory"):
        translate(tmp_path / "b.yaml", tool="megatron")


@pytest.mark.parametrize(
    ("tool", "change", "part"),
    [
        ("axolotl", {"rl": "dpo"}, "not on preferences"),
        ("axolotl", {"adapter": "llama-adapter"}, "does not train"),
        ("axolotl", {"context_parallel_size": 2, "sequence_parallel_degree": 4}, "say different things"),
        ("axolotl", {"context_parallel_size": 3}, "do not divide"),
        ("llama-factory", {"stage": "dpo"}, "does not train"),
        ("llama-factory", {"finetuning_type": "freeze"}, "does not train"),
        ("llama-factory", {"interleave_probs": "0.5,0.5"}, "1 data sets have 2 shares"),
        ("ms-swift", {"tuner_type": "adalora"}, "does not train"),
        ("ms-swift", {"rlhf_type": "dpo"}, "not on preferences"),
        ("torchtune", {"teacher_model": {"_component_": "x"}}, "longspan annotate"),
        ("trl", {"warmup_ratio": 3}, "share of the run"),
        ("trl", {"warmup_steps": math.inf}, "warmup_steps is no number"),
        ("trl", {"save_steps": math.inf}, "save_steps is no number"),
        ("trl", {"lr_scheduler_kwargs": {"min_lr": "low"}}, "min_lr is no number"),
        ("trl", {"lr_scheduler_kwargs": {"min_lr": 1e-6}, "learning_rate": 0}, "greater than 0"),
        ("axolotl", {"dp_replicate_size": 0}, "dp_replicate_size is below 1"),
        ("axolotl", {"dp_replicate_size": -1}, "dp_replicate_size is below 1"),
    ],
)
def test_what_cannot_be_right_is_refused(tool, change, part, tmp_path):
    """A run that prefers or rewards would come out as plain fine-tuning."""
    with pytest.raises(ConfigError, match=part):
        translate(written(tmp_path, {**LEAST[tool], **change}), tool=tool, processes=4)


def test_what_is_missing_can_be_given(tmp_path):
    """TRL's own class has neither model nor data: they stand in a script."""
    path = written(tmp_path, {"max_length": 128, "packing_strategy": "bfd", "assistant_only_loss": True})
    with pytest.raises(ConfigError, match=r"--set model\.path"):
        translate(path)
    with pytest.raises(ConfigError, match="does not say the model"):
        translate(path, overrides=["stages=[]"])
    made = translate(path, overrides=["model.path=m", "stages.0.streams={data: {records: [chats.jsonl]}}"])
    assert TrainConfig.from_dict(made.recipe).stages[0].objective == "sft"


@pytest.mark.parametrize(
    ("config", "apart", "said"),
    [
        ({"packing": True, "attn_implementation": "flash_attention_2"}, True, ""),
        ({"packing": True, "attn_implementation": "sdpa"}, True, "without FlashAttention"),
        (
            {"packing": True, "packing_strategy": "wrapped", "attn_implementation": "flash_attention_2"},
            False,
            "mask",
        ),
        ({"packing": False}, True, "not packed there"),
    ],
)
def test_rows_without_document_masks_stay_so_and_it_is_said(config, apart, said, tmp_path):
    """Packing without masks there is other training than packing with them here."""
    made = translate(written(tmp_path, {**LEAST["trl"], **config}), tool="trl")
    assert made.recipe["stages"][0].get("document_mask", True) is apart
    assert said in " ".join(made.remarks)


def test_pretraining_of_llama_factory_packs_where_it_is_not_said(tmp_path):
    """What is left out is what the tool does, which depends on the stage there."""
    made = translate(written(tmp_path, {**LEAST["llama-factory"], "stage": "pt"}), tool="llama-factory")
    assert made.recipe["stages"][0]["document_mask"] is False
    (note,) = [note for note in made.notes if note.key == "packing"]
    assert note.value is True and note.kind == "left out there"


def test_rope_by_name_takes_its_factor_from_the_models_own_length(tmp_path):
    """LLaMA-Factory and ms-swift work the factor out when they load the model, rounded up."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    values = {
        **LEAST["llama-factory"],
        "model_name_or_path": "base",
        "rope_scaling": "yarn",
        "cutoff_len": 10000,
    }
    made = translate(written(tmp_path, values), tool="llama-factory")
    assert made.recipe["stages"][0]["rope"] == {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 4096,
    }
    made = translate(written(tmp_path, {**values, "cutoff_len": 4096}), tool="llama-factory")
    assert "rope" not in made.recipe["stages"][0]
    assert next(note.kind for note in made.notes if note.key == "rope_scaling") == "without effect"


LLAMA31 = {
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
}


@pytest.mark.parametrize(
    ("tool", "rope", "factor", "original"),
    [
        ("ms-swift", "yarn", 8.0, 8192),
        ("axolotl", {"rope_type": "yarn", "factor": 2.0}, 2.0, 131072),
    ],
)
@pytest.mark.parametrize("config", [LLAMA31, {"model_type": "mllama", "text_config": LLAMA31}])
def test_a_rope_of_a_model_that_is_scaled_already(config, tool, rope, factor, original, tmp_path):
    """By name, ms-swift counts from what the model's own scaling counts from; a mapping without `original_...` is left
    to transformers, which counts from `max_position_embeddings`."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    names = {"ms-swift": ("model", "max_length"), "axolotl": ("base_model", "sequence_len")}
    values = {**LEAST[tool], **dict(zip(names[tool], ("base", 65536))), "rope_scaling": rope}
    made = translate(written(tmp_path, values), tool=tool)
    found = made.recipe["stages"][0]["rope"]
    assert (found["factor"], found["original_max_position_embeddings"]) == (factor, original)


def test_the_length_of_a_row_may_be_the_models(tmp_path):
    """ms-swift takes all positions of a model, not those before it was extended."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA31))
    values = {name: value for name, value in LEAST["ms-swift"].items() if name != "max_length"}
    made = translate(written(tmp_path, {**values, "model": "base"}), tool="ms-swift")
    assert made.recipe["stages"][0]["context_length"] == 131072


@pytest.mark.parametrize("config", ["[]", "{", '{"max_position_embeddings": "x", "rope_scaling": "yarn"}'])
def test_a_model_whose_config_says_nothing_is_as_one_that_is_not_at_hand(config, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(config)
    values = {**LEAST["ms-swift"], "model": "base", "rope_scaling": "yarn"}
    made = translate(written(tmp_path, values), tool="ms-swift")
    assert "rope" not in made.recipe["stages"][0] and "NOT in the recipe" in " ".join(made.remarks)


def test_a_key_that_is_off_does_not_contradict_one_that_is_on(tmp_path):
    """`gradient_checkpointing: false` stands beside FSDP's own in published configs."""
    fsdp = {"fsdp_activation_checkpointing": True}
    values = {**LEAST["axolotl"], "gradient_checkpointing": False, "fsdp_config": fsdp}
    made = translate(written(tmp_path, values), tool="axolotl")
    assert made.recipe["memory"]["activation_checkpointing"] == "full"


def test_rank_stabilised_adapters_keep_their_scale(tmp_path):
    """peft scales by alpha / sqrt(rank) then; here it is alpha / rank."""
    values = {**LEAST["axolotl"], "adapter": "lora", "lora_r": 16, "lora_alpha": 8, "peft_use_rslora": True}
    lora = translate(written(tmp_path, values), tool="axolotl").recipe["lora"]
    assert lora["alpha"] / lora["rank"] == 8 / math.sqrt(16)


def test_data_sets_of_llama_factory_are_looked_up(tmp_path):
    (tmp_path / "data").mkdir()
    entries = {
        "chats": {"file_name": "c.jsonl", "formatting": "sharegpt"},
        "pairs": {"file_name": "p.json"},
        "hub": {"hf_hub_url": "org/set", "formatting": "sharegpt", "columns": {"messages": "turns"}},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries))
    made = translate(
        written(tmp_path, {**LEAST["llama-factory"], "dataset": "chats, pairs,hub"}), tool="llama-factory"
    )
    streams = made.recipe["stages"][0]["streams"]
    assert streams["c"]["records"] == ["data/c.jsonl", "data/p-messages.jsonl"]
    assert streams["set"]["store"] == ["stores/set"]
    assert made.before == [
        "longspan data tokenize hf://org/set --tokenizer m --messages-field turns --out stores/set"
    ]


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.md", "corpus.txt.gz"])
def test_plain_texts_are_tokenized_first(name, tmp_path):
    """A stream reads JSON lines: as `records`, a plain text was given up at the first step of the data."""
    values = {**LEAST["axolotl"], "datasets": [{"path": name, "type": "completion"}]}
    made = translate(written(tmp_path, values), tool="axolotl")
    (stream,) = made.recipe["stages"][0]["streams"].values()
    assert stream["store"] == [f"stores/{name}"] and "records" not in stream
    assert made.before == [f"longspan data tokenize {name} --tokenizer m --out stores/{name}"]


@pytest.mark.parametrize(
    "found", ["[]", "{", '{"d": null}', '{"d": "d.json"}', '{"d": {"columns": ["messages"]}}']
)
def test_lists_of_data_sets_that_are_none_are_no_traceback(found, tmp_path):
    """An entry that is a name, or nothing, ended the command in the middle."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(found)
    try:
        made = translate(written(tmp_path, LEAST["llama-factory"]), tool="llama-factory")
    except ConfigError as error:
        assert "dataset_info.json" in str(error) and found in ("[]", "{")
    else:
        (stream,) = made.recipe["stages"][0]["streams"].values()
        assert stream["records"] == ["data/d-messages.jsonl"]


def test_a_deepspeed_file_is_read_where_it_is_at_hand(tmp_path):
    zero = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "scheduler": {"type": "x"},
    }
    (tmp_path / "ds.json").write_text(json.dumps(zero))
    made = translate(
        written(tmp_path, {**LEAST["axolotl"], "deepspeed": "ds.json"}), tool="axolotl", processes=4
    )
    assert made.recipe["parallel"] == {"dp_shard": 4} and made.recipe["memory"]["offload_parameters"]
    assert any("its own scheduler" in remark for remark in made.remarks)


def test_command_lines_take_variables_files_and_launchers(tmp_path):
    """A variable that is not put in its place names a folder that is nowhere."""
    (tmp_path / "more.yaml").write_text("learning_rate: 3e-5\nmax_length: 64\n")
    script = """
    export ROOT=/models; NAME="big one"; EACH=4
    # swift sft --model wrong
    torchrun --nproc_per_node=4 --nnodes 2 /opt/swift/cli/sft.py more.yaml --model ${ROOT}/x \\
        --dataset a.jsonl b.jsonl#7 --learning_rate 1e-5 --output_dir $OUT \\
        --gradient_accumulation_steps $(expr 32 / $EACH / 2) | tee log
    """
    made = translate(written(tmp_path, script, "run.sh"))
    assert made.tool == "ms-swift"
    assert made.recipe["stages"][0]["streams"]["a"]["records"] == ["a.jsonl", "b.jsonl[7]"]
    assert made.recipe["stages"][0]["lr"] == 1e-5 and made.recipe["stages"][0]["context_length"] == 64
    assert made.recipe["parallel"]["dp_replicate"] == 8
    assert made.recipe["stages"][0]["batch_tokens"] == 4 * 8 * 64
    assert any("$OUT" in remark for remark in made.remarks)
