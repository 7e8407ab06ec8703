"""Which documents are used by which set: one SQLite file that several commands share, at the same time too."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from longspan.core.errors import DataError, RunError

_BUSY_SECONDS = 60.0


class UsedDocuments:
    """Content hashes of used documents, each with the set that has it.

    Raises:
        DataError: the file is something else.
        RunError: the disk refuses.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def owner_in(self, folder: Path) -> str:
        """Return the name under which a job in a folder claims documents: the folder, as seen from this file."""
        folder, root = folder.resolve(), self.path.resolve().parent
        return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else folder.as_posix()

    def owners(self) -> dict[str, str]:
        """Return the owner of every used document by its hash; nothing where there is no file yet."""
        if not self.path.exists():
            return {}
        with self._open() as database:
            return dict(database.execute("SELECT document, owner FROM used"))

    def claim(self, documents: Iterable[str], owner: str) -> set[str]:
        """Make these the documents of `owner`, all at once; return those that no other has.

        What it had before and does not want any more is free again.
        """
        wanted = list(documents)
        with self._open() as database, database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("DELETE FROM used WHERE owner = ?", (owner,))
            database.executemany(
                "INSERT OR IGNORE INTO used VALUES (?, ?)", ((document, owner) for document in wanted)
            )
            taken = {
                row[0] for row in database.execute("SELECT document FROM used WHERE owner = ?", (owner,))
            }
        return taken

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)) as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS used (document TEXT PRIMARY KEY, owner TEXT NOT NULL)"
                )
                yield database
        except (sqlite3.OperationalError, OSError) as error:
            raise RunError(f"{self.path} cannot be used", found=str(error)) from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path} is not a file of used documents",
                found=str(error),
                fix="choose another with --used",
            ) from None
