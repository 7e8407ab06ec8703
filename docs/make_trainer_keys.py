"""Writes docs/coming-from-trainers.md from the tables that `longspan import-config` translates by:
`python docs/make_trainer_keys.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.train.translate.meanings import MEANINGS
from longspan.train.translate.tables import KINDS, TOOLS, read_tool

PAGE = Path(__file__).with_name("coming-from-trainers.md")
HEAD = """\
# Coming from another trainer

`longspan import-config` makes a recipe of a config of axolotl, LLaMA-Factory, TRL, ms-swift or torchtune: YAML, JSON, or
a shell script with the command line.

```
longspan import-config axolotl.yaml --processes 8 --out recipe.yaml
longspan train recipe.yaml --dry-run
```

**No key is lost in silence.** Each is translated, said to be without effect here and why, or said not to be carried over
and what to do; so are keys that nobody knows. What the tool does where the file says nothing is written into the
recipe. What cannot be right, such as training on preferences, is refused. The notes stand above the recipe as comments;
`--json` has them for programs. `--set KEY=VALUE` changes the recipe, as in `train`, and `--from TOOL` says whose file
it is where keys do not.

## What is another thing here

| | there | here |
|---|---|---|
| batch | samples on each GPU, times accumulation, times GPUs | `batch_tokens`: rows of `context_length` in all. The GPUs are not in the file: give `--processes`. Those that share a sequence count once |
| rows | packed only where the file says so | always packed; documents of a row do not see each other. `pack: {strategy: intact}` puts one in each row |
| documents of a row | kept apart or not, by tool, option and attention kernel | `document_mask`; false where they see each other there |
| too long | cut, left out or an error, by tool | `pack.overflow`: `split`, `drop_tail` or `drop`, each counted |
| loss | mean over the tokens of a step, in older releases of each micro-batch or process | sum over the tokens of a step, divided once; `loss_average` has the others |
| what is learnt | by the data's form and one or two options | `objective: sft` what the assistant wrote, `lm` every token |
| warm-up | begins at a rate of 0, so its first step does nothing | begins at one step's share of the rate |
| weights | often kept in bfloat16 | float32 beside bfloat16 computation, as bfloat16 loses small updates; frozen weights beside adapters are bfloat16 |
| data | names of data sets on the hub, loaded when training begins | files are read as they are (`records`); others become token stores by the command that the notes give |
| last model | the best by evaluation loss, where asked for | the last |

## Questions and answers as conversations

Records of `instruction`, `input` and `output` (alpaca), or of other fields with a question and an answer, are written as
conversations once; then the chat template says how a model is asked.

```python
import json

def conversations(records):
    for record in records:
        question = "\\n".join(part for part in (record["instruction"], record.get("input")) if part)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
        yield {"messages": turns}

with open("alpaca.json") as source, open("alpaca-messages.jsonl", "w") as target:
    for record in conversations(json.load(source)):
        target.write(json.dumps(record) + "\\n")
```

`longspan data chat alpaca-messages.jsonl` shows what is in the file.
"""
TITLES = {
    "without effect": ("Without effect here", "why"),
    "not carried over": ("Not carried over", "what to do"),
    "refused": ("Refused", "why"),
}


def ours(meaning: str) -> str:
    """Return the settings that say what a key means, as links would be too many."""
    return ", ".join(f"`{each}`" for each in MEANINGS[meaning].split(", ")).replace(
        " or store`", "` or `store`"
    )


def tables(values: Mapping[str, Any]) -> list[str]:
    """Return what is said of each key of a table."""
    defaults = values.get("defaults", {})
    lines = ["| key | setting | left out there |", "|---|---|---|"]
    by_meaning: dict[str, list[str]] = {}
    for key, meaning in values["translated"].items():
        by_meaning.setdefault(meaning, []).append(f"`{key}`")
    for meaning, keys in by_meaning.items():
        value = defaults.get(meaning)
        lines.append(f"| {', '.join(keys)} | {ours(meaning)} | {'' if value is None else f'`{value}`'} |")
    for kind in KINDS:
        if kind in values:
            title, heading = TITLES[kind]
            lines += ["", f"**{title}:**", "", f"| keys | {heading} |", "|---|---|"]
            for each in values[kind]:
                keys = ", ".join(f"`{key}`" for key in dict.fromkeys(each["keys"]))
                lines.append(f"| {keys} | {each.get('why') or each['do']} |")
    return [*lines, ""]


def page() -> str:
    """Return the whole page."""
    tools = [read_tool(name) for name in TOOLS]
    lines = [HEAD]
    for values in tools:
        own = (
            " It takes those of [transformers' Trainer](#transformers-trainer) too."
            if "includes" in values
            else ""
        )
        lines += [
            f"## {values['name']}",
            "",
            f"Its keys: [{values['page'].split('/')[2]}]({values['page']}).{own}",
            "",
        ]
        lines += [*(f"- {sentence}" for sentence in values["differs"]), "", *tables(values)]
    names = ", ".join(values["name"] for values in tools if "includes" in values)
    lines += ["## transformers' Trainer", "", f"`TrainingArguments`, which {names} take.", ""]
    lines += tables(read_tool("trainer"))
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
