"""What a model reads beyond its context length without training: its RoPE as it is, interpolated, with a larger base.

Run it with `python examples/compare_rope.py MODEL OUT`.
"""

import sys
from pathlib import Path

import longspan

LENGTHS = (96, 192)


def main(model: str, out: Path) -> None:
    settings = {
        "as-it-is": {},
        "interpolated": {"rope": {"rope_type": "linear", "factor": 2.0}},
        "larger-base": {"rope_theta": 8e4},
    }
    for label, changed in settings.items():
        asked = {"model": model, "label": label, **changed}
        ppl = longspan.evaluate_model(asked, "ppl", out, data=__file__, lengths=LENGTHS, num_spans=1)
        needle = longspan.evaluate_model(asked, "needle", out, lengths=LENGTHS, depths=(0, 1), samples=1)
        found = {row["length"]: round(row["perplexity"], 2) for row in ppl["by_length"]}
        print(f"{label:>13}: perplexity by length {found}, needles found {needle['mean']:.0%}")
    print(longspan.write_report(out, out / "report.html").page)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
