"""What a run leaves out stands at its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_slow(number): pass

@pytest.mark.parametrize("number", range(2))
def test_skipped(number): pytest.skip("no device")

@pytest.mark.skipif(True, reason="no server")
def test_without_server(): pass

def test_quick(): pass
"""


def run(folder: Path, *arguments: str) -> list[str]:
    """Lines of the last section of a run over `TESTS`, without what comes after it."""
    (folder / "test_some.py").write_text(TESTS)
    (folder / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom left_out import *\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: takes long\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    _, _, section = printed.partition(" left out ")
    return [line for line in section.splitlines()[1:] if line and not line.startswith("=")]


SKIPPED = ["3 skipped:", "     2  no device", "     1  no server"]


@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["one process", "two"])
def test_what_was_left_out_is_named_with_its_reason(tmp_path: Path, processes: tuple[str, ...]) -> None:
    slow = ["3 marked slow, run by `make test-all`:", "     3  test_some.py"]
    assert run(tmp_path, *processes, "-m", "not slow") == slow + SKIPPED


def test_what_the_user_deselected_is_counted_apart(tmp_path: Path) -> None:
    assert run(tmp_path, "-k", "quick or slow") == ["3 deselected by -k or -m:", "     3  test_some.py"]


def test_nothing_is_said_where_nothing_was_left_out(tmp_path: Path) -> None:
    assert (
        run(tmp_path, "-k", "skipped or server", "test_some.py::test_skipped", "test_some.py::test_without_server")
        == SKIPPED
    )
    assert run(tmp_path, "test_some.py::test_quick") == []
