from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import ouroboros_llm

ROOT = Path(__file__).parent.parent


def test_public_names_are_pinned() -> None:
    assert ouroboros_llm.__all__ == sorted(ouroboros_llm.__all__, key=str)
    assert set(ouroboros_llm._MODULES) | {"__version__"} == set(ouroboros_llm.__all__)
    for name, module in ouroboros_llm._MODULES.items():
        assert getattr(ouroboros_llm, name).__module__ == f"ouroboros_llm.{module}"
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        getattr(ouroboros_llm, "nothing_of_ours")  # noqa: B009


def test_errors_have_one_root() -> None:
    errors = [
        value
        for name in ouroboros_llm.__all__
        if inspect.isclass(value := getattr(ouroboros_llm, name)) and issubclass(value, Exception)
    ]
    assert len(errors) >= 9
    assert all(issubclass(error, ouroboros_llm.OuroborosError) for error in errors)


def test_public_names_say_what_they_are() -> None:
    for name in ouroboros_llm.__all__:
        value = getattr(ouroboros_llm, name)
        assert name == "__version__" or inspect.getdoc(value), name


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert ouroboros_llm.__version__ in headings


def test_the_missing_extra_names_its_command() -> None:
    error = ouroboros_llm.MissingExtraError("langchain-core", "langchain")
    assert isinstance(error, ImportError)
    assert 'pip install "ouroboros-llm[langchain]"' in str(error)
