"""The README.md of an adapter folder: how others load it with the RoPE that it was trained with."""

from __future__ import annotations

import json

from transformers import AutoConfig, PreTrainedModel

from longspan.models.hf_config import text_config

__all__ = ["adapter_card", "adapter_note"]

CARD = """---
base_model: {base}
library_name: peft
---

# Adapter for long contexts

It was trained beside `{base}` with another RoPE and context length than that folder may have. An adapter has no place
for them: `PeftModel.from_pretrained` and `AutoModelForCausalLM.from_pretrained` take those of the base, silently,
and the model then answers wrongly on long inputs. {how}

`max_position_embeddings`: {context}, `rope_parameters`:

```json
{rope}
```
"""
GIVE_CONFIG = """Give the base the config.json of this folder:

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("path/to/this/folder")
base = AutoModelForCausalLM.from_pretrained("{base}", config=config)
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

or merge it into a folder that any tool loads: `longspan export path/to/this/folder --out merged`."""
MERGE = """The base reads more than text and the adapter is for its language model alone, so peft cannot
put it there. Merge it into a folder that any tool loads: `longspan export path/to/this/folder --out merged`."""


def adapter_note(base: str) -> str:
    """Return what everyone who loads an adapter folder has to know."""
    return (
        f"peft and AutoModel load {base} with its own RoPE and context length, not with those of this training: load "
        "it as README.md in the folder says, or merge it with `longspan export`"
    )


def adapter_card(model: PreTrainedModel, base: str) -> str:
    """Return the README.md of the adapter of a model; `base` is the folder or hub name that it was trained beside."""
    text = text_config(model.config)
    return CARD.format(
        base=base,
        how=(MERGE if _reads_more_than_text(base) else GIVE_CONFIG).format(base=base),
        rope=json.dumps(getattr(text, "rope_parameters", None), indent=2),
        context=getattr(text, "max_position_embeddings", None),
    )


def _reads_more_than_text(base: str) -> bool:
    try:
        whole = AutoConfig.from_pretrained(base)
    except (OSError, ValueError):
        return False
    return text_config(whole) is not whole
