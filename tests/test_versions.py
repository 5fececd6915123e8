"""The lock pins what is installed, and pyproject's ranges are closed above where nothing newer was tested."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from ouroboros_llm import __version__, transformers_api

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
READ_FROM_INSIDE = {"torch", "transformers"}
"""Packages of which we read more than their public interface: a minor release may break it."""
NEWEST_TESTED = {"torch": "2.15.0"}
"""Where that is not what the lock has: by `make test-newest`."""


def pins() -> Iterator[Requirement]:
    """Lines of the lock, markers included: a package may have several."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if pin := line.partition("#")[0].strip():
            yield Requirement(pin)


def locked() -> dict[str, SpecifierSet]:
    """The one version of each package that the lock has for this Python and system."""
    # A marker without extras in it asks for none.
    here = [pin for pin in pins() if pin.marker is None or pin.marker.evaluate({**default_environment(), "extra": ""})]
    names = [canonicalize_name(pin.name) for pin in here]
    assert len(names) == len(set(names)), "a package has two pins for one environment"
    return {name: pin.specifier for name, pin in zip(names, here, strict=True)}


def installed(found: Iterator[tuple[str, str]]) -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in found if name != "ouroboros-llm"}


def direct() -> list[Requirement]:
    """What pyproject asks for, extras included, without the names of its own extras."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    asked = [Requirement(line) for group in groups for line in group]
    return [one for one in asked if one.name != PROJECT["name"]]


def test_every_installed_version_is_the_locked_one() -> None:
    record = Path(sys.prefix) / ".installed"
    if not record.exists():
        pytest.skip("this environment was not made by `make setup`")
    at_setup = installed(tuple(line.split("==")) for line in record.read_text().splitlines())  # type: ignore[misc]
    now = installed((each.metadata["Name"], each.version) for each in distributions())
    if changed := sorted(name for name in {*at_setup, *now} if at_setup.get(name) != now.get(name)):
        pytest.skip(f"this environment was changed since `make setup`: {', '.join(changed)}")
    pinned = locked()
    assert sorted({*now} - {*pinned}) == []
    assert {name: version for name, version in now.items() if version not in pinned[name]} == {}


def test_the_lock_has_exact_versions_and_names_no_place() -> None:
    assert all([part.operator for part in pin.specifier] == ["=="] and "*" not in str(pin.specifier) for pin in pins())
    assert all(pin.url is None for pin in pins())
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text and " /" not in text and "--" not in text


@pytest.mark.parametrize("one", direct(), ids=str)
def test_the_lock_admits_what_pyproject_asks_for(one: Requirement) -> None:
    # Every version of it: other Pythons and systems have their own.
    versions = [
        part.version
        for pin in pins()
        if canonicalize_name(pin.name) == canonicalize_name(one.name)
        for part in pin.specifier
    ]
    assert versions and all(version in one.specifier for version in versions)


def next_release(newest: str, *, minor: bool) -> str:
    """The release that nothing may be older than: of the next minor, or of the next major (minor before 1.0)."""
    major, second = (*Version(newest).release, 0)[:2]
    return f"{major}.{second + 1}" if minor or major == 0 else str(major + 1)


@pytest.mark.parametrize("one", direct(), ids=str)
def test_ranges_end_where_nothing_was_tested(one: Requirement) -> None:
    name = canonicalize_name(one.name)
    newest = NEWEST_TESTED.get(name) or max(
        (part.version for pin in pins() if canonicalize_name(pin.name) == name for part in pin.specifier), key=Version
    )
    bounds = {part.operator: part.version for part in one.specifier}
    assert set(bounds) == {">=", "<"}
    assert bounds["<"] == next_release(newest, minor=name in READ_FROM_INSIDE)


@pytest.mark.parametrize("folder", sorted((ROOT / "distributions").iterdir()), ids=lambda folder: folder.name)
def test_other_names_have_our_version(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__ and project["name"] == folder.name
    [asked] = map(Requirement, project["dependencies"])
    assert (asked.name, str(asked.specifier)) == (PROJECT["name"], f"=={__version__}")
    assert asked.extras < {*PROJECT["optional-dependencies"]}


def test_tested_versions_are_the_declared_range() -> None:
    [declared] = [one.specifier for one in map(Requirement, PROJECT["dependencies"]) if one.name == "transformers"]
    assert transformers_api.tested_versions() == declared
    assert transformers_api.tested_versions("torch") and not transformers_api.tested_versions("nothing-of-ours")
