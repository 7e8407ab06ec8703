"""A real server: `transformers serve` on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.patience import PATIENCE_SECONDS
from tests.ports import free_port


@contextmanager
def transformers_serving(folder: Path, *, log: Path) -> Iterator[str]:
    """`transformers serve FOLDER` on a free port of this machine; its address."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: pip install -e '.[dev]'")
    port = free_port()
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32"], stdout=file, stderr=file, env=environment
        )
    try:
        for _ in range(int(PATIENCE_SECONDS / 0.05)):
            assert process.poll() is None, log.read_text()
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert json.load(answer) == {"status": "ok"}
                break
            except (URLError, OSError):
                time.sleep(0.05)
        else:
            pytest.fail(log.read_text())
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)
