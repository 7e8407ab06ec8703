"""Are GGUF files of many families and RoPEs the models? Small random ones are asked of transformers and of llama.cpp.

    pip install 'longspan[llamacpp]'        # llama.cpp for Python, built; tested with 2026.10.11549
    python benchmarks/gguf_families.py OUT --converter llama.cpp --tokenizer MODEL --sentencepiece MODEL2

Each model is made with weights wide enough that attention is sharp, exported as `longspan export --gguf f32` does, and
asked for the token after so many others, in float32, the cache too. Printed is the largest difference of a log
probability among llama.cpp's 20 likeliest, and beside it what the same model without its RoPE differs by.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from gguf_asked import ask, served
from longspan.core.errors import UserError
from longspan.models.export import export_model
from longspan.models.gguf_file import find_converter, refuse_config, write_gguf
from longspan.models.hf import load_model

LENGTH, ORIGINAL = 8192, 1024
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e6},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1 + 0.02 * pair for pair in range(16)],
        "long_factor": [1 + 0.4 * pair for pair in range(16)],
    },
}
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": LENGTH, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "norm_topk_prob": True, "query_pre_attn_scalar": 32, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
TIED, WINDOW = {"tie_word_embeddings": True}, {"sliding_window": 256}
OLMO3 = {
    "full_attention": {**ROPES["yarn"], "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
}
GEMMA3 = {
    "full_attention": {**ROPES["yarn"], "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama", "default", {}),
    ("llama", "linear", {}),
    ("llama", "yarn", {}),
    ("llama", "llama3", {}),
    ("phi3", "longrope", {}),
    ("llama", "yarn", TIED),
    ("mistral", "yarn", {}),
    ("mistral", "default", WINDOW),
    ("qwen3", "yarn", {}),
    ("qwen3_moe", "yarn", {}),
    ("gemma3_text", "yarn", {**WINDOW, "num_hidden_layers": 6, "rope_parameters": GEMMA3}),
    ("olmo3", "yarn", {**WINDOW, "rope_parameters": OLMO3}),
    ("gpt_oss", "yarn", WINDOW),
    ("smollm3", "yarn", {}),
    ("granite", "yarn", {}),
)
SENTENCEPIECE = ("phi3", "gemma3_text")
"""Families whose converters read no other tokenizer."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--converter")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="a folder with a byte-level tokenizer.json"
    )
    parser.add_argument("--sentencepiece", type=Path, help="a folder with a tokenizer.model")
    parser.add_argument("--tokens", type=int, nargs="*", default=[600, 3000, 6000])
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    options = parser.parse_args()
    converter = find_converter(options.converter)
    print(
        "| family | RoPE | " + " | ".join(f"{count:,}" for count in options.tokens) + " | without its RoPE |"
    )
    print("|---" * (3 + len(options.tokens)) + "|")
    for place in options.cases:
        family, rope, changed = CASES[place]
        words = options.sentencepiece if family in SENTENCEPIECE else options.tokenizer
        try:
            cells = _measured(
                family, rope, changed, words, options.out / str(place), converter, options.tokens
            )
        except UserError as error:
            cells = [str(error).split("\n")[0]]
        said = "".join(
            f", {name}"
            for name, known in (("tied head", TIED), ("windows", WINDOW))
            if known.items() <= changed.items()
        )
        print(f"| {family}{said} | {rope} | {' | '.join(cells)} |", flush=True)
    # llama.cpp's threads do not end by themselves.
    sys.stdout.flush()
    os._exit(0)


def _measured(
    family: str,
    rope: str,
    changed: dict[str, Any],
    words: Path,
    out: Path,
    converter: list[str],
    tokens: list[int],
) -> list[str]:
    config = _config(family, {"vocab_size": _vocab_size(family, words), **changed})
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _sharpen(made)
    made.save_pretrained(out / "made")
    told = None if "rope_parameters" in changed else {"rope_theta": 1e4, **ROPES[rope]}
    model = load_model(out / "made", rope=told)
    refuse_config(model.config)
    export_model(model, out / "model", dtype="float32", tokenizer=words)
    file = write_gguf(out / "model", out / "model.gguf", "f32", converter)
    ours = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    bare = load_model(out / "made", rope={"rope_type": "default", "rope_theta": 1e4})
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, config.vocab_size, (max(tokens),), generator=draw).tolist()
    server = served(file, len(ids) + 64)
    cells = []
    for count in tokens:
        theirs = ask(server, ids[:count])
        wanted = _next(ours, ids[:count])
        worst = max(abs(wanted[token].item() - given) for token, given in theirs.items())
        same = wanted.argmax().item() == max(theirs, key=theirs.__getitem__)
        cells.append(f"{worst:.1e}{'' if same else ', another token'}")
    likeliest = list(theirs)
    return [*cells, f"{(_next(bare, ids) - wanted)[likeliest].abs().max():.1f}"]


def _config(family: str, changed: dict[str, Any]) -> PretrainedConfig:
    default = AutoConfig.for_model(family)
    known = default.to_dict().keys() | set(default.attribute_map)
    fields = {name: value for name, value in SMALL.items() if name in known} | changed
    if kinds := getattr(default, "layer_types", None):
        fields["layer_types"] = list(kinds)[: fields["num_hidden_layers"]]
    return AutoConfig.for_model(family, **fields)


def _vocab_size(family: str, words: Path) -> int:
    if family in SENTENCEPIECE:
        return int(SentencePieceProcessor(model_file=str(words / "tokenizer.model")).vocab_size())
    return len(AutoTokenizer.from_pretrained(words))


def _sharpen(model: torch.nn.Module) -> None:
    """Draw weights by which a query tells keys apart: as they are made, all would be alike to it."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.0 if "embed" in name else 1.2 / weight.shape[-1] ** 0.5, generator=draw)


def _next(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return the log probabilities of the next token, fp64 [vocabulary]."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids]), logits_to_keep=1).logits
    return logits[0, -1].double().log_softmax(-1)


if __name__ == "__main__":
    main()
