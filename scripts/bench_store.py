"""Measure the phrase store: `scripts/with_postgres python scripts/bench_store.py [--url URL ...]`

Without `--url`: a SQLite file in the temporary folder, and the PostgreSQL of `scripts/with_postgres`, where that is
around us. Everything happens in new files beside the one that a SQLite URL names, or in new schemas of a PostgreSQL
database; both are removed at the end. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import random
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any
from uuid import uuid4

import sqlalchemy
from sqlalchemy import create_engine, make_url, text

from ouroboros_llm import __version__
from ouroboros_storage import PhraseStore

SCOPE = "bench:one"
VOCABULARY = 150_000
RUNS_PER_FLUSH = 50
STUCK_SECONDS = 300
"""After which a measurement that should have ended is given up."""
NOTE_NAMES = 20_000
"""Tokens whose successors a scope keeps; each turn writes those of 200."""


@dataclass(frozen=True)
class Sizes:
    tokens: int
    turns: int
    processes: int
    opens: int


class Place:
    """An empty database, until `remove`."""

    def __init__(self, base: str) -> None:
        url = make_url(base)
        name = f"ouroboros_bench_{uuid4().hex[:12]}"
        self._base, self._schema = base, name
        self.sqlite = url.get_backend_name() == "sqlite"
        if self.sqlite:
            self.path = Path(str(url.database)).absolute().with_name(f"{name}.db")
            self.url = f"sqlite:///{self.path}"
        else:
            self._execute(f"CREATE SCHEMA {name}")
            self.url = url.update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(False)

    def nbytes(self) -> int:
        """What the tables and their indexes take on disk. No store is open."""
        if self.sqlite:
            return self.path.stat().st_size
        size = "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND relnamespace = "
        return int(self._execute(f"{size}'{self._schema}'::regnamespace"))

    def remove(self) -> None:
        if not self.sqlite:
            self._execute(f"DROP SCHEMA {self._schema} CASCADE")
            return
        for companion in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + companion).unlink(missing_ok=True)

    def _execute(self, statement: str) -> Any:
        engine = create_engine(self._base, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            result = connection.execute(text(statement))
            found = result.scalar() if result.returns_rows else None
        engine.dispose()
        return found


@contextmanager
def place(base: str) -> Iterator[Place]:
    found = Place(base)
    try:
        yield found
    finally:
        found.remove()


def open_store(url: str) -> PhraseStore:
    return PhraseStore(url, scope_quota=None)


def a_run(generator: random.Random, length: int) -> list[int]:
    """Half to one and a half times `length` tokens."""
    return [generator.randrange(VOCABULARY) for _ in range(generator.randint(length // 2, length * 3 // 2))]


def fill(url: str, tokens: int, length: int) -> int:
    """Write runs of about `length` tokens to one scope; returns how many tokens."""
    generator, written = random.Random(length), 0
    with open_store(url) as store:
        pool = store.open(SCOPE, fingerprint="f")
        while written < tokens:
            for _ in range(RUNS_PER_FLUSH):
                run = a_run(generator, length)
                pool.add(run)
                written += len(run)
            store.flush()
    return written


def turn(pool: Any, generator: random.Random) -> None:
    """What a turn leaves behind: an answer of 100 tokens, and notes."""
    pool.add([generator.randrange(VOCABULARY) for _ in range(100)])
    names = generator.sample(range(NOTE_NAMES), 200)
    pool.remember({f"model/successors/{name}": generator.randbytes(64) for name in names})


def seconds(action: Callable[[], object]) -> float:
    began = perf_counter()
    action()
    return perf_counter() - began


def bytes_per_token(base: str, sizes: Sizes, length: int) -> str:
    with place(base) as found:
        tokens = fill(found.url, sizes.tokens, length)
        return f"{found.nbytes() / tokens:.1f}"


def open_seconds(url: str, sizes: Sizes) -> str:
    def opened() -> None:
        with open_store(url) as store:
            store.open(SCOPE, fingerprint="f")

    found = [seconds(opened) for _ in range(sizes.opens)]
    return f"{median(found):.2f} s ({min(found):.2f} to {max(found):.2f})"


def flush_seconds(url: str, sizes: Sizes) -> str:
    generator, found = random.Random(0), []
    with open_store(url) as store:
        pool = store.open("bench:turns", fingerprint="f")
        for _ in range(sizes.turns):
            turn(pool, generator)
            found.append(seconds(store.flush) * 1e3)
    return f"{median(found):.1f} ms, p99 {quantiles(found, n=100, method='inclusive')[-1]:.1f} ms"


def write_turns(url: str, number: int, turns: int, barrier: Any) -> None:
    """One of several processes. If it fails, none of the others waits for it."""
    generator = random.Random(number)
    try:
        with open_store(url) as store:
            pool = store.open("bench:shared", fingerprint="f")
            barrier.wait()
            for _ in range(turns):
                turn(pool, generator)
                store.flush()
        barrier.wait()
    except BaseException:
        barrier.abort()
        raise


def turns_per_second(url: str, sizes: Sizes) -> str:
    # New interpreters: nothing of this process's connections may be shared.
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(sizes.processes + 1, timeout=STUCK_SECONDS)
    turns = max(1, sizes.turns // sizes.processes)
    arguments = [(url, number, turns, barrier) for number in range(sizes.processes)]
    writers = [context.Process(target=write_turns, args=each) for each in arguments]
    for writer in writers:
        writer.start()
    barrier.wait()
    elapsed = seconds(barrier.wait)
    for writer in writers:
        writer.join()
    with open_store(url) as store:
        runs = sum(scope.runs for scope in store.list() if scope.scope == "bench:shared")
    expected = sizes.processes * turns
    return f"{expected / elapsed:.0f}" + ("" if runs == expected else f" ({expected - runs} of {expected} turns lost)")


def upkeep(url: str, tokens: int) -> dict[str, str]:
    with open_store(url) as store:
        copying = seconds(lambda: store.copy(SCOPE, "bench:copy"))
        pruning = seconds(lambda: store.prune("bench:copy", max_tokens=tokens // 2))
        deleting = seconds(lambda: store.delete(SCOPE))
    return {"copy": f"{copying:.2f} s", "prune to half": f"{pruning:.2f} s", "delete": f"{deleting:.2f} s"}


def measure(base: str, sizes: Sizes) -> dict[str, str]:
    """Every figure of one database."""
    rows = {
        f"bytes per stored token, runs of about {length}": bytes_per_token(base, sizes, length) for length in (100, 20)
    }
    with place(base) as found:
        tokens = fill(found.url, sizes.tokens, 100)
        scope = f"a scope of {tokens:,} tokens"
        rows[f"open {scope}, median of {sizes.opens} (range)"] = open_seconds(found.url, sizes)
        rows[f"flush one turn, median of {sizes.turns}"] = flush_seconds(found.url, sizes)
        rows[f"turns per second, {sizes.processes} processes, one scope"] = turns_per_second(found.url, sizes)
        rows |= {f"{what} {scope}": value for what, value in upkeep(found.url, tokens).items()}
    return rows


def name(base: str) -> str:
    if make_url(base).get_backend_name() == "sqlite":
        return f"SQLite {sqlite3.sqlite_version}"
    engine = create_engine(base)
    with engine.connect() as connection:
        version = str(connection.scalar(text("SHOW server_version"))).split()[0]
        durable = connection.scalar(text("SHOW fsync"))
    engine.dispose()
    return f"PostgreSQL {version}, fsync {durable}"


def file_system(path: Path) -> str:
    """Its type, where Linux tells; of the longest mount point that the path lies under."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    return max((mount for mount in mounts if path.is_relative_to(mount[0])), key=lambda mount: len(mount[0]))[1]


def conditions(urls: list[str]) -> str:
    folders = [Path(str(make_url(url).database)).absolute().parent for url in urls if url.startswith("sqlite")]
    parts = [
        "A turn is a run of 100 tokens and 200 notes of 64 bytes, flushed while the database holds the large scope.",
        f"{os.cpu_count()} cores ({platform.machine()}), {platform.system()}, SQLite on",
        ", ".join(dict.fromkeys(map(file_system, folders))) or "no file",
        f"; ouroboros-llm {__version__}, SQLAlchemy {sqlalchemy.__version__}, Python {platform.python_version()}.",
    ]
    return " ".join(parts).replace(" ;", ";")


def arguments() -> tuple[list[str], Sizes]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", action="append", help="a database; may be given several times")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of the large scope")
    parser.add_argument("--turns", type=int, default=300, help="flushes that are timed")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--opens", type=int, default=5)
    given = parser.parse_args()
    sizes = Sizes(given.tokens, given.turns, given.processes, given.opens)
    return given.url or [], sizes


def main() -> None:
    urls, sizes = arguments()
    with tempfile.TemporaryDirectory(prefix="ouroboros-bench-") as folder:
        postgres = os.environ.get("OUROBOROS_TEST_POSTGRES")
        urls = urls or [f"sqlite:///{folder}/phrases.db", *([postgres] if postgres else [])]
        columns = {}
        for url in urls:
            print(f"measuring {make_url(url).render_as_string()}", file=sys.stderr)
            columns[name(url)] = measure(url, sizes)
        rows: dict[str, list[str]] = {}
        for column in columns.values():
            for what, value in column.items():
                rows.setdefault(what, []).append(value)
        print("| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns), sep="\n")
        for what, values in rows.items():
            print(f"| {what} | " + " | ".join(values) + " |")
        print("\n" + conditions(urls))


if __name__ == "__main__":
    main()
