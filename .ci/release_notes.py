"""Print what CHANGELOG.md says of a version: the notes of its release.

python .ci/release_notes.py 0.2.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def release_notes(changelog: str, version: str) -> str:
    """Return the section of a version, without its heading. Raises SystemExit where there is none."""
    heading = re.compile(rf"^## \[?{re.escape(version)}\]?(?: [^\n]*)?\n", re.MULTILINE)
    found = heading.search(changelog)
    if found is None:
        raise SystemExit(f"CHANGELOG.md has no section for {version}")
    rest = changelog[found.end() :]
    following = re.search(r"^## ", rest, re.MULTILINE)
    notes = rest[: following.start() if following else None].strip()
    if not notes:
        raise SystemExit(f"CHANGELOG.md says nothing of {version}")
    return notes


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    text = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    sys.stdout.write(release_notes(text, sys.argv[1]) + "\n")
