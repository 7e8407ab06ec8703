"""What becomes of the tokens of a store at several lengths, before anything is trained; no token is copied.

Run it with `python examples/look_at_plans.py STORE OUT`.
"""

import sys
from pathlib import Path

import longspan


def main(store: str, out: Path) -> None:
    mixed = longspan.mix_stores(store, out / "mixture", mode="per_source", tokens="100k")
    for name, source in mixed.plan.report.sources.items():
        print(f"{name or 'texts'}: {source.documents} documents, {source.tokens:,} tokens")
    for length in (512, "2k", "8k"):
        for strategy in ("concat", "best_fit"):
            place = out / f"{strategy}-{length}"
            plans = longspan.pack_rows(out / "mixture", place, length, strategy=strategy, remainder="pad")
            report = plans[place].report
            filled = 1 - report.padding_tokens / (report.rows * plans[place].spec.length)
            print(
                f"{strategy:>8} {length:>4}: {report.rows} rows, {filled:.1%} filled, dropped {report.dropped}"
            )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
