"""From texts to a report in six calls; some seconds on a CPU, nothing is downloaded.

Run it with `python examples/whole_way.py OUT`.
"""

import sys
from pathlib import Path

import longspan
from longspan.data.tokenizer import train_bpe

MODEL = {"model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64}
MODEL |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}


def main(out: Path) -> None:
    # Our own sources as texts; a model that is to be extended brings its tokenizer along.
    package = Path(longspan.__file__).parent
    texts = [path.read_text("utf-8") for path in package.glob("core/*.py")]
    train_bpe(texts, out / "tokenizer", vocab_size=512)

    longspan.tokenize_corpus(package / "train", out / "tokenizer", out / "store")
    longspan.mix_stores(out / "store", out / "mixture", mode="none")
    longspan.pack_rows(out / "mixture", out / "rows", 256)
    short = {"name": "short", "context_length": 128, "streams": {"text": {"store": "store"}}}
    long = {"name": "long", "context_length": 256, "streams": {"text": {"rows": "rows"}}}
    long["rope"] = {"rope_type": "default", "rope_theta": 4e4}
    steps = {"steps": 8, "batch_tokens": 1024, "lr": 3e-3}
    recipe = {"model": {"hf_config": MODEL}, "tokenizer": "tokenizer"}
    recipe["stages"] = [short | steps, long | steps]
    done = longspan.train_model(recipe, out / "run", data_root=out)
    for folder in done.models.values():
        longspan.evaluate_model(folder, "ppl", out / "run", data=package / "models", lengths=(64, 256))
    print(longspan.write_report(out / "run", out / "report.html").page)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
