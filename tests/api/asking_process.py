"""A job that asks a server many things and writes each answer once; run as a process of its own, to be killed.

python tests/api/asking_process.py SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from longspan.api import ChatRequest, Client, Endpoint, Limits
from longspan.core.records import JsonlWriter, read_jsonl

WARM = 500
"""Answers after which memory is measured first: pools and buffers are full then."""


def main(settings: dict[str, Any]) -> None:
    out = Path(settings["out"])
    written = {record["id"] for record in read_jsonl(out)} if out.exists() else set()

    def requests() -> Iterator[tuple[int, ChatRequest]]:
        for number in range(settings["count"]):
            if number not in written:
                text = f"question {number} " + settings["padding"] * "x"
                yield number, ChatRequest(prompt=text, max_tokens=10, prompt_tokens=20)

    endpoint = Endpoint(model="m", base_url=settings["url"], timeout=settings["timeout"])
    limits = Limits.from_dict(settings["limits"])
    process = psutil.Process()
    memory: list[int] = []
    with Client(endpoint, limits=limits, cache=settings["cache"]) as client, JsonlWriter(out) as writer:
        for place, (number, result) in enumerate(client.complete(requests())):
            writer.write({"id": number, "text": result.text, "error": result.error})
            if place % WARM == WARM - 1:
                memory.append(process.memory_info().rss)
        report = client.report()._asdict()
    Path(settings["report"]).write_text(json.dumps({"memory": memory, "report": report}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
