"""What the first lines of the recipes for today's models promise."""

from __future__ import annotations

from typing import NamedTuple


class Promised(NamedTuple):
    """The GPUs that a recipe names, its lengths and the family of its model."""

    gpu: str
    processes: int
    lengths: tuple[int, ...]
    family: str


TODAY = {
    "smollm2-8k": Promised("rtx-4090", 1, (2048, 4096, 4096), "llama"),
    "qwen3-4b-128k": Promised("h100", 8, (65536, 131072, 65536), "qwen3"),
    "qwen3-8b-128k": Promised("h100", 8, (65536, 131072, 65536), "qwen3"),
    "llama-3.2-1b-128k": Promised("h100", 8, (65536, 131072, 65536), "llama"),
    "gemma3-1b": Promised("l40s", 4, (65536, 131072, 65536), "gemma3_text"),
    "olmo3-7b-64k": Promised("h100", 8, (65536, 65536), "olmo3"),
    "gpt-oss-20b": Promised("h100", 8, (65536, 131072, 65536), "gpt_oss"),
}
