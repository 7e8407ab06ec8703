"""One case of benchmarks/train.py on our side: `longspan train`'s own trainer on a recipe."""

from __future__ import annotations

import torch

from longspan.core.log import setup_logging
from longspan.core.records import read_jsonl
from longspan.train.config import TrainConfig
from longspan.train.trainer import train
from train_clock import StepClock, read_case, write_result


def main() -> None:
    case = read_case()
    torch.set_num_threads(case["threads"])
    setup_logging()
    clock = StepClock()
    train(TrainConfig.from_dict(case["recipe"], where="benchmark"), case["run"], data_root=case["work"])
    losses = [line["loss"] for line in read_jsonl(f"{case['run']}/metrics.jsonl")]
    write_result(case, clock.result(losses))


if __name__ == "__main__":
    main()
