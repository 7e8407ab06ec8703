"""What mkdocs does to the pages: links to files outside of docs/ lead to the repository."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Return a page whose links leave docs/ for the repository; on a disk they lead to the files themselves."""
    return _OUTSIDE.sub(rf"]({config.repo_url}/blob/main/\1)", markdown)
