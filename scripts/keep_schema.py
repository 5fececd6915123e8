"""Keep a small database of the present schema version: `scripts/with_postgres python scripts/keep_schema.py FOLDER`

Writes `version-N.db` (SQLite) and `version-N.sql` (PostgreSQL) into FOLDER, made by the store that is imported. Run it
before you append to `ouroboros_storage.migrations`, or with PYTHONPATH at a worktree of an earlier commit. The tests
open a copy of each kept database with the code of the day and compare what they find with `CONTENTS`.
"""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EPOCH = 1_767_225_600
"""Where the clock starts, in seconds since 1970: 2026-01-01."""

CONTENTS: tuple[tuple[str, str, tuple[tuple[int, ...], ...]], ...] = (
    ("conversation:42", "f", ((1, 2, 3), (4, 5, 6, 7))),
    ("conversation:42", "f", ((1, 2, 3),)),
    ("conversation:42", "g", ((1, 2, 3),)),
    ("agent:ünï ' %", "f", ((0, 2**31, 2**32 - 1), tuple(range(100, 400)))),
    ("agent:silent", "f", ((),)),
)
"""Scope, fingerprint and runs of one flush each."""

REJECTED = (7, 8, 9)
"""A run of "conversation:42" and "f" that begins no answer, where the version knows the difference."""

NOTES = {"m/calibration": b"\x00old and new\xff", "m/successors/5": b"12345678"}
"""Notes of "conversation:42" and "f", where the version has them."""


def fill(url: str) -> None:
    from ouroboros_storage import PhraseStore

    for scope, fingerprint, runs in CONTENTS:
        with PhraseStore(url) as store:
            pool: Any = store.open(scope, fingerprint=fingerprint)
            for run in runs:
                pool.add(run)
    with PhraseStore(url) as store:
        pool = store.open("conversation:42", fingerprint="f")
        if hasattr(pool, "remember"):
            pool.add(REJECTED, answer=False)
            pool.remember(NOTES)


def keep_sqlite(path: Path) -> None:
    # Small pages make a small file; nothing else of it is set here.
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA page_size = 512")
        connection.execute("VACUUM")
    connection.close()
    fill(f"sqlite:///{path}")


def keep_postgres(path: Path, url: str) -> None:
    fill(url)
    address = url.replace("+psycopg", "")
    command = ["pg_dump", "--inserts", "--no-owner", "--no-privileges", address]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # What is left can be read into any schema, by any version of the server.
    lines = [line for line in dump.splitlines() if line and not re.match(r"--|\\|SET |SELECT .*search_path", line)]
    path.write_text("\n".join(lines).replace("public.", "") + "\n")


class Clock:
    """A second passes whenever somebody looks."""

    seconds = EPOCH

    def __call__(self) -> int:
        self.seconds += 1
        return self.seconds * 1_000_000_000


def main() -> None:
    clock = Clock()
    time.time_ns = clock  # before the store takes a name for it
    from ouroboros_storage.migrations import MIGRATIONS

    folder, name = Path(sys.argv[1]), f"version-{len(MIGRATIONS)}"
    clock.seconds = EPOCH
    keep_sqlite(folder / f"{name}.db")
    clock.seconds = EPOCH
    keep_postgres(folder / f"{name}.sql", os.environ["OUROBOROS_TEST_POSTGRES"])


if __name__ == "__main__":
    main()
