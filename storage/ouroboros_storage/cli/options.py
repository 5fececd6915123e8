"""What commands are told: which database, how to print, how old."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ouroboros_llm.errors import StoreError

from .display import say

if TYPE_CHECKING:
    from sqlalchemy import URL

    from ..records import StoredScope
    from ..store import PhraseStore

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_STORE = f"{__name__}.store"
_SUFFIXES = (".db", ".sqlite", ".sqlite3")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

scope_argument = click.argument("scope")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else on stdout.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


def store_option(command: Decorated) -> Decorated:
    """`--store`, on the group and on each command; what stands nearer to the command wins."""
    option = click.option(
        "--store",
        metavar="URL|FILE",
        expose_value=False,
        callback=_note_store,
        help="The database. Default: $OUROBOROS_STORE, else phrases.db in the user's data folder.",
    )
    return option(command)


def _note_store(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value == "":  # an unset variable of a script must not mean the default database
        raise click.BadParameter("is empty; give a URL or a file, or leave it out")
    if value is not None:
        # Contexts share their meta, and a group's options are read before its command's.
        context.meta[_STORE] = value


@contextmanager
def opened(*, create: bool = False) -> Iterator[PhraseStore]:
    """The store that was asked for. Without `create` it has to be there.

    Nothing is dropped that nobody asked to drop: quotas belong to whoever writes answers.
    """
    from ..store import PhraseStore

    with _told_warnings(), PhraseStore(_url(), create=create, scope_quota=None, quota=None) as store:
        store.setup()
        yield store


def store_name() -> str:
    """The database's URL without its password."""
    return _url().render_as_string(hide_password=True)


def _url() -> URL:
    from sqlalchemy import URL
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    from ouroboros_llm.defaults import default_store

    given = click.get_current_context().meta.get(_STORE) or default_store()
    if "://" not in given and _is_path(given):
        return URL.create("sqlite", database=os.path.abspath(os.path.expanduser(given)))
    try:
        return make_url(given)
    except (ArgumentError, ValueError):
        # What was given stays out of the message: the part that is wrong may be the password.
        raise StoreError(
            "store must be a database URL such as 'sqlite:///phrases.db' or "
            "'postgresql+psycopg://USER@HOST/DATABASE', or the path of a SQLite file"
        ) from None


def _is_path(text: str) -> bool:
    """Whether a file is meant: it is there, or nothing else is written so."""
    return os.path.exists(text) or "/" in text or os.sep in text or text[0] in "~." or Path(text).suffix in _SUFFIXES


@contextmanager
def _told_warnings() -> Iterator[None]:
    """The store's warnings are a line on stderr, without the place in the code that gave them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        usual = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, RuntimeWarning):
                say(f"Warning: {message}")
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = tell
        yield


def find_scopes(store: PhraseStore, names: Iterable[str]) -> dict[str, list[StoredScope]]:
    """What there is of each of these scopes: a row per tokenizer.

    Raises:
        StoreError: there is no such scope. OptionError: not a name.
    """
    from ouroboros_llm.phrase_pool.base import check_scope

    found: dict[str, list[StoredScope]] = {check_scope(name): [] for name in names}
    for one in store.list():
        if one.scope in found:
            found[one.scope].append(one)
    for name, rows in found.items():
        if not rows:
            raise StoreError(
                f"there is no scope {name!r} in {store_name()}; `ouroboros pool list` names those there are"
            )
    return found


def parse_age(context: click.Context, parameter: click.Parameter, text: str | None) -> timedelta | None:
    """A number and a unit as an age."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is no age; write a number and one of s, m, h, d, w, as in 90m or 30d")
    try:
        return timedelta(**{_UNITS[found[2]]: float(found[1])})
    except OverflowError as error:
        raise click.BadParameter(f"{text!r} is longer than there has been time") from error
