"""One case of benchmarks/train.py by the Hugging Face Trainer or TRL's SFTTrainer; imports nothing of longspan.

Every batch holds the documents of the step that longspan makes of its rows, so that losses can be compared. Only a
case that lets the trainer choose (`sampling` other than sequential, `packing`) trains on documents of its own order.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,  # noqa: TID251  here it is the peer
    TrainingArguments,
)

from train_clock import Case, StepClock, read_case, write_result


class Documents(Dataset):
    """Documents in the order in which a sequential sampler takes them."""

    def __init__(self, case: Case) -> None:
        steps: list[list[list[int]]] = json.loads(Path(case["documents"]).read_text())
        # What group_by_length does to the documents of a step, longest first.
        sort = case.get("sorted", False)
        steps = [sorted(step, key=len, reverse=True) if sort else step for step in steps]
        self.per_step = len(steps[0])
        self.examples = [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
            for step in steps
            for ids in step
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


def arguments(case: Case, documents: Documents) -> dict[str, Any]:
    """Return what both trainers are told: ours are AdamW without decay, a constant rate and clipping at 1."""
    batch = case["batch"]
    rows = case.get("rows_per_step", 1)
    return {
        "output_dir": case["run"],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": case.get("checkpointing", False),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": (rows if case.get("packing") else documents.per_step) // batch,
        "max_steps": case["steps"],
        "learning_rate": case["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": case.get("sampling", "sequential"),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "torch_compile": case.get("compile", False),
    }


def hugging_face(case: Case, model: Any, documents: Documents) -> Trainer:
    """Return the Trainer with padded batches, or with documents laid end to end and restarting positions."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(case["model"])
    if case.get("flat"):
        collator: Any = DataCollatorWithFlattening()
    else:
        collator = DataCollatorForSeq2Seq(tokenizer)
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(case, documents)),
        train_dataset=documents,
        data_collator=collator,
        processing_class=tokenizer,
    )


def sft(case: Case, model: Any, documents: Documents) -> Trainer:
    """Return the SFTTrainer, padded, padding-free or packed by its own strategies."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    packing = case.get("packing")
    settings = arguments(case, documents) | {
        "packing": bool(packing),
        "packing_strategy": packing or "bfd",
        "padding_free": case.get("flat", False),
        "max_length": case["row_tokens"] if packing else None,
    }
    ids = [{"input_ids": example["input_ids"]} for example in documents.examples]
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=datasets.Dataset.from_list(ids),
        processing_class=PreTrainedTokenizerFast.from_pretrained(case["model"]),
    )


def main() -> None:
    case = read_case()
    torch.set_num_threads(case["threads"])
    if case["tool"] == "trl":
        import trl  # noqa: F401  so that what it imports is in the base of memory
    clock = StepClock()
    documents = Documents(case)
    model = AutoModelForCausalLM.from_pretrained(
        case["model"], dtype=torch.float32, attn_implementation=case.get("attention", "sdpa")
    )
    trainer = (sft if case["tool"] == "trl" else hugging_face)(case, model, documents)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    versions = {
        name: importlib.metadata.version(name) for name in ("transformers", "accelerate", "trl") if _has(name)
    }
    write_result(case, clock.result(losses, versions=versions))


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
