"""Documents that answers may quote, as a pool of phrases that is only read (retrieval, after REST, arXiv 2311.08252).

Whole stretches of a document are tokenized, line breaks included, so that the tokens are those that a model writes when
it quotes more than a few words: only where a quote begins may they differ (after a space, a quotation mark or another
indentation the first word is another token), and there matching backs off to the one token before. A code fence or a
list marker in the answer costs one token likewise, then the words inside are the document's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..chat.text import HALVES
from ..errors import OptionError, StoreError
from .base import Phrase, PoolStats
from .memory import MemoryPool, Run

TEXT_FILES = frozenset(
    ".c .cfg .cpp .cs .css .csv .go .h .hpp .html .ini .java .js .json .jsonl .kt .lua .md .php .py .rb .rs .rst "
    ".scala .sh .sql .swift .tex .toml .ts .tsv .txt .xml .yaml .yml".split()
)
"""What is read in a folder. A file that is named itself may be called anything."""

_STRETCH = 8192
"""Characters tokenized at once, where paragraphs allow it."""

_RUN = 4096
"""Tokens of a run at most."""

_BLANK_LINES = re.compile(r"(\n(?:[ \t]*\n)+)")


@dataclass(frozen=True, eq=False, slots=True)
class DocumentPool:
    """A `PhrasePool` of documents. It is never the scope that a session writes."""

    _pool: MemoryPool

    def add(self, token_ids: Sequence[int], *, answer: bool = True) -> None:
        """Raises StoreError: documents are only read."""
        raise StoreError("a pool of documents is read-only; write to the pool of a scope, and read this one beside it")

    def match(self, tail: Sequence[int]) -> list[Phrase]:
        return self._pool.match(tail)

    @property
    def stats(self) -> PoolStats:
        return self._pool.stats


def documents_pool(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, capacity: int = 1_000_000
) -> DocumentPool:
    """A read-only pool of what the texts say. A paragraph that was there before, in any of them, is left out.

    Args:
        capacity: tokens at most. What comes after is left out, with a RuntimeWarning.

    Raises:
        OptionError: not a collection of strings.
    """
    if isinstance(texts, str):
        raise OptionError("texts must be several, but got one string; write [text]")
    pool, room = MemoryPool(capacity), capacity
    seen = set[int]()
    for text in texts:
        if not isinstance(text, str):
            raise OptionError(
                f"texts must be strings, but one is {type(text).__name__}; open files with read_documents"
            )
        runs = [Run(run, answer=False) for run in runs_of(text, tokenizer, seen)]
        fitting = _fitting(runs, room)
        pool.add_all(fitting)
        room -= sum(len(run.token_ids) for run in fitting)
        if len(fitting) < len(runs):
            warnings.warn(
                f"documents hold more than {capacity} tokens; what comes after is left out. Raise capacity to keep it",
                RuntimeWarning,
                stacklevel=2,
            )
            break
    return DocumentPool(pool)


def read_documents(paths: Iterable[str | Path]) -> Iterator[str]:
    """The texts of files, one a file, in the order of `paths`; a folder gives its text files by name, hidden ones not.

    Raises:
        OptionError: no such file, no text files in a folder, or a file that is not UTF-8. Names the path.
    """
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        for file in _walk(path) if path.is_dir() else [path]:
            try:
                yield file.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise OptionError(
                    f"document {str(file)!r} must be text in UTF-8, but is not ({error}); convert it or leave it out"
                ) from error
            except OSError as error:
                raise OptionError(f"document {str(file)!r} cannot be read: {error.strerror}") from error


def paragraphs(text: str) -> list[str]:
    """The parts between blank lines, each with the blank lines behind it: together they are the text."""
    parts = [*_BLANK_LINES.split(text), ""]
    return [paragraph for pair in zip(parts[::2], parts[1::2], strict=True) if (paragraph := "".join(pair))]


def runs_of(text: str, tokenizer: PreTrainedTokenizerBase, seen: set[int]) -> Iterator[list[int]]:
    """The token runs of a text, without the paragraphs in `seen`, by hash, which grows by its own."""
    for stretch in _stretches(text, seen):
        encoded = tokenizer(_whole(stretch), add_special_tokens=False, verbose=False)
        token_ids: list[int] = encoded["input_ids"]
        yield from (token_ids[start : start + _RUN] for start in range(0, len(token_ids), _RUN))


def _stretches(text: str, seen: set[int]) -> Iterator[str]:
    """Neighboring paragraphs together, without those in `seen`, which grows by theirs."""
    stretch = ""
    for paragraph in paragraphs(text):
        key = hash(paragraph.strip())
        if key in seen or len(stretch) + len(paragraph) > _STRETCH:
            if stretch:
                yield stretch
            stretch = ""
        if key not in seen:
            seen.add(key)
            stretch += paragraph
    if stretch:
        yield stretch


def _whole(text: str) -> str:
    """Text of whole characters: two halves make one, a lone one is replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if HALVES.search(text) else text


def _fitting(runs: list[Run], room: int) -> list[Run]:
    fitting = []
    for run in runs:
        room -= len(run.token_ids)
        if room < 0:
            break
        fitting.append(run)
    return fitting


def _walk(folder: Path) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in TEXT_FILES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise OptionError(
            f"document folder {str(folder)!r} has no text files; name a file itself if it has another ending"
        )
    return files
