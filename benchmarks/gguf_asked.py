"""Is an exported GGUF file the model? The same long prompt is asked of transformers and of llama.cpp.

    pip install 'longspan[llamacpp]'        # llama.cpp for Python, built; tested with 2026.10.11549
    python benchmarks/gguf_asked.py MODEL OUT --converter llama.cpp --layers 4 --tokens 3000

Prints, for four RoPEs, the largest difference of a log probability among llama.cpp's 20 likeliest next tokens.
Everything is in float32, the cache too. Fewer layers make it fast; RoPE is in each of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longspan.data.texts.python_corpus import reference_documents
from longspan.models.export import export_model
from longspan.models.gguf_file import find_converter, refuse_config, write_gguf
from longspan.models.hf import load_model

ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 5e6},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
LIKELIEST = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a model folder with its tokenizer")
    parser.add_argument("out", type=Path)
    parser.add_argument("--converter")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=3_000)
    parser.add_argument("--ropes", nargs="*", default=list(ROPES))
    options = parser.parse_args()
    converter = find_converter(options.converter)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = "\n".join(document.text for document in reference_documents())
    ids = tokenizer(text)["input_ids"][: options.tokens]
    print(
        "| RoPE | tokens | largest difference of a log probability | same likeliest token |\n|---|---|---|---|"
    )
    for name in options.ropes:
        folder = options.out / name
        file = folder / f"{name}.gguf"
        if not file.exists():
            model = load_model(options.model, rope=_rope(name, options.model), max_position_embeddings=32_768)
            model.model.layers = model.model.layers[: options.layers]
            model.config.num_hidden_layers = options.layers
            refuse_config(model.config)
            export_model(model, folder, dtype="float32", tokenizer=options.model)
            write_gguf(folder, file, "f32", converter)
        theirs, ours = ask(served(file, len(ids) + 64), ids), _ask_transformers(folder, ids)
        worst = max(abs(ours[token].item() - given) for token, given in theirs.items())
        same = ours.argmax().item() == max(theirs, key=theirs.__getitem__)
        print(f"| {name} | {len(ids):,} | {worst:.1e} | {'yes' if same else 'no'} |", flush=True)
    # llama.cpp's threads do not end by themselves.
    sys.stdout.flush()
    os._exit(0)


def _rope(name: str, model: Path) -> dict[str, object]:
    config = AutoConfig.from_pretrained(model)
    rope = {"rope_theta": config.rope_parameters["rope_theta"], **ROPES[name]}
    if rope["rope_type"] in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = config.max_position_embeddings
    return rope


def _ask_transformers(folder: Path, ids: list[int]) -> torch.Tensor:
    """Return the log probabilities of the next token, fp64 [vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].double().log_softmax(-1)


def served(file: Path, context: int) -> Any:
    """Start llama.cpp's server for a file, in float32, its cache too."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(file), context, 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.warmup = False
    return xllamacpp.Server(settings)


def ask(server: Any, ids: list[int]) -> dict[int, float]:
    """Return the log probabilities of the likeliest next tokens.

    One token alone is asked for: of several, the server leaves out those that are parts of a character.
    """
    asked = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "logprobs": LIKELIEST}
    said = server.handle_completions(asked)
    likeliest = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {each["id"]: each["logprob"] for each in likeliest}


if __name__ == "__main__":
    main()
