"""Which tokens are BOS, EOS and padding: special tokens only, never a word that texts can hold.

A vocabulary may hold `</s>` as an ordinary entry, learnt from pages about HTML or other tokenizers. Names are
therefore looked up among special tokens. A config that names a token makes it special, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from longspan.core.files import read_json
from longspan.data.tokenizer.engine import ROLES

CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")
_LISTS = ("additional_special_tokens", "extra_special_tokens")

# What the roles are called where no config names them.
COMMON_NAMES: dict[str, tuple[str, ...]] = {
    "bos": ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
    "eos": ("<|eos|>", "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
}


def named_tokens(folder: Path) -> dict[str, str] | None:
    """Return bos_token, eos_token and the like as the configs beside a tokenizer name them; None: no config."""
    files = [folder / name for name in CONFIGS if (folder / name).is_file()]
    names: dict[str, str] = {}
    for content in map(read_json, files):
        if isinstance(content, dict):
            found = {name: _text(value) for name, value in content.items() if name.endswith("_token")}
            names |= {name: text for name, text in found.items() if text}
    return names if files else None


def with_named_special(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a tokenizer.json in which the added tokens that the configs name are special.

    Published tokenizers have an EOS that is not marked so: a document that mentions it would end there.
    """
    named = set((named_tokens(folder) or {}).values())
    for file in CONFIGS:
        config = read_json(folder / file) if (folder / file).is_file() else None
        for listed in map(config.get, _LISTS) if isinstance(config, dict) else ():
            if isinstance(listed, (list, dict)):
                values = listed if isinstance(listed, list) else list(listed.values())
                named.update(filter(None, map(_text, values)))
    marked = [
        {**token, "special": True} if token.get("content") in named else token
        for token in content.get("added_tokens") or []
    ]
    return {**content, "added_tokens": marked}


def special_ids(
    path: Path, reference: tokenizers.Tokenizer, roles: Mapping[str, str | None] | None
) -> tuple[tuple[int | None, ...], list[str]]:
    """Return the ids of BOS, EOS and padding, and what a user should know about them.

    They are named by a config, else by the file, else by common names.

    Args:
        path: the tokenizer's file; configs stand beside it.
        roles: names of bos, eos and pad that the file itself gives.
    """
    names = named_tokens(path.parent)
    added = reference.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special}
    notes = [
        f"{name} and the ordinary word {word!r} have the same id {number}: the ids of the vocabulary have gaps, "
        "and the tokenizers library numbers added tokens by counting"
        for name, number in special.items()
        if (word := reference.model.id_to_token(number)) not in (None, name)
    ]
    ids: list[int | None] = []
    for role in ROLES:
        if names is not None:
            name = names.get(f"{role}_token", "")
            ids.append(special.get(name, reference.token_to_id(name)))
            # Not marked as special, it still is a role's, unless texts turn into it.
            if name not in special and ids[-1] in reference.encode(name, add_special_tokens=False).ids:
                ids[-1] = None
                notes.append(
                    f"{role}_token of the config is {name!r}, which is an ordinary word of this vocabulary and no "
                    f"special token: left without a {role.upper()}"
                )
        elif roles is not None:
            ids.append(special.get(roles[role] or ""))
        else:
            known = (special.get(name) for name in COMMON_NAMES[role])
            ids.append(next((number for number in known if number is not None), None))
    return tuple(ids), notes


def _text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
