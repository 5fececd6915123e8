"""`ouroboros doctor`: what works here, what does not, and what to do about it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click

from . import checks, model_checks
from .checks import Check

if TYPE_CHECKING:
    from ..ouroboros import Ouroboros

_SIGNS = {"ok": "ok     ", "warning": "warning", "failure": "FAILURE"}


@click.command()
@click.argument("model", required=False)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--fetch", is_flag=True, help="Fetch the weights where they are not on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON, and nothing else on stdout.")
@click.pass_context
def doctor(context: click.Context, model: str | None, device: str, dtype: str, fetch: bool, as_json: bool) -> None:
    """Check versions, machine, store and MODEL (default: $OUROBOROS_MODEL or the small one), and ask it something.

    The exit status is 0 only if an answer was given. Nothing is fetched unless --fetch says so.
    """
    from ..defaults import default_model

    name = model or default_model()
    found: list[Check] = []
    for check in examine(name, device, dtype, fetch):
        found.append(check)
        if not as_json:
            click.echo(f"{_SIGNS[check.state]}  {check.name + ':':13} {check.text}")
    answered = any(check.name == "answer" and check.state == "ok" for check in found)
    if as_json:
        report = {"model": name, "answered": answered, "checks": [asdict(check) for check in found]}
        click.echo(json.dumps(report, indent=2, ensure_ascii=False, default=str))
    else:
        click.echo(f"{name} answers." if answered else f"No answer by {name} could be given.")
    context.exit(0 if answered else 1)


def examine(model: str, device: str, dtype: str, fetch: bool) -> Iterator[Check]:
    """Make all checks, each as soon as it can be."""
    for name in ("versions", "processor", "accelerator", "environment", "store"):
        yield checks.run(name, getattr(checks, name))
    weights = checks.run("weights", partial(checks.weights, model))
    if weights.state == "failure" and not fetch:
        yield weights
        yield Check("answer", "failure", "none without weights")
        return
    # A folder that is here is loaded as it is; by name, the hub would be asked.
    name = weights.facts.get("folder") or model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say stands in the checks
        yield from _examine_model(name, device, dtype)


def _examine_model(model: str, device: str, dtype: str) -> Iterator[Check]:
    loaded: list[Ouroboros] = []

    def load() -> Check:
        from ..ouroboros import Ouroboros

        # In memory: the answer to a check is no phrase of anybody.
        loaded.append(Ouroboros.from_pretrained(model, device=device, dtype=dtype))
        return checks.weights(model)

    weights = checks.run("weights", load)
    yield weights
    if not loaded:
        yield Check("answer", "failure", "none, because the model cannot be loaded")
    for ouroboros in loaded:
        with ouroboros:
            for name, check in model_checks.CHECKS.items():
                yield checks.run(name, partial(check, ouroboros))
