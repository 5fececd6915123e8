"""Progress of what takes long, and the switch that silences it."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from rich.console import Console

from ouroboros_llm import progress, show_progress
from ouroboros_llm.cli import main


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    monkeypatch.delenv("OUROBOROS_PROGRESS", raising=False)
    file = io.StringIO()
    monkeypatch.setattr(progress.console, "_file", file)
    yield file
    show_progress(None)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, shown: io.StringIO) -> io.StringIO:
    console = Console(file=shown, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    return shown


def test_a_step_is_a_line_where_nobody_looks(shown: io.StringIO) -> None:
    with progress.step("loading a model"), progress.step("probing it", quiet=True):
        pass
    progress.say("done")
    assert shown.getvalue() == "loading a model\ndone\n"


def test_a_step_on_a_terminal_says_how_long_it_took(terminal: io.StringIO) -> None:
    assert progress.is_animated(progress.console)
    with progress.step("loading a model"), progress.step("within it", quiet=True):
        pass
    assert "loading a model: 0.0 s" in terminal.getvalue() and "within it:" not in terminal.getvalue()


def test_a_step_that_fails_leaves_no_spinner(terminal: io.StringIO) -> None:
    with pytest.raises(ValueError), progress.step("loading a model"):
        raise ValueError
    with progress.step("loading another"):
        pass
    assert "loading another: 0.0 s" in terminal.getvalue() and "a model:" not in terminal.getvalue()


def test_the_log_is_told_in_any_case(shown: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ouroboros_llm")
    show_progress(False)
    with progress.step("loading a model"):
        progress.say("half of it")
    assert shown.getvalue() == ""
    assert [record.getMessage().partition(" took")[0] for record in caplog.records] == ["half of it", "loading a model"]


@pytest.mark.parametrize("value", ["0", "false", "OFF", "no"])
def test_the_environment_silences(value: str, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUROBOROS_PROGRESS", value)
    with progress.step("loading a model"):
        progress.say("half of it")
    assert terminal.getvalue() == "" and not progress.is_animated(progress.console)
    show_progress(True)
    progress.say("the call counts for more")
    assert "counts for more" in terminal.getvalue()


def test_the_command_line_has_a_switch(shown: io.StringIO) -> None:
    assert CliRunner().invoke(main, ["--quiet", "replay", "--help"]).exit_code == 0
    assert not progress.is_shown()


def test_a_message_is_not_taken_for_a_line_that_somebody_has_to_see(capfd: pytest.CaptureFixture[str]) -> None:
    """Without logging configured, only warnings reach standard error."""
    logging.getLogger("ouroboros_llm").info("told")
    assert "told" not in capfd.readouterr().err and sys.stderr is not None


def test_standard_error_is_looked_up_when_something_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A test that had put a file into the console's place would leave its own standard error there."""
    progress.say("heard")
    assert capsys.readouterr().err == "heard\n"
