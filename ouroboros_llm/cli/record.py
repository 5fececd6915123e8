"""`ouroboros record`: greedy traces of a model, for `ouroboros replay`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from ..bench.prompts import Conversation
    from ..bench.traces import Trace
    from ..ouroboros import Ouroboros

AT_LEAST_ONE = click.IntRange(min=1)


@click.command()
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="Registry name, folder or hub id.")
@click.option(
    "--prompts",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines with `prompt`, `question`, `turns` (the first is asked) or `messages`.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Traces as JSON lines. Prompts that the file has already are passed over, so an interrupted run goes on.",
)
@click.option(
    "--limit",
    type=AT_LEAST_ONE,
    help="Prompts at most: of each category where the file has categories, else of the file.",
)
@click.option("--max-new-tokens", type=AT_LEAST_ONE, default=256, show_default=True, help="Length of an answer.")
@click.option("--category", help="Category of prompts that name none. Default: the name of the prompt file.")
@click.option("--instruction", default="", help="Text put before every prompt.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def record(
    model: str,
    prompts: Path,
    output: Path,
    limit: int | None,
    max_new_tokens: int,
    category: str | None,
    instruction: str,
    dtype: str,
    device: str,
) -> None:
    """Record what a model answers to prompts, greedily, with the likeliest tokens at every position."""
    from rich.console import Console
    from rich.progress import track

    from ..bench.prompts import read_prompts
    from ..bench.traces import recorded_ids, write_trace
    from ..ouroboros import Ouroboros
    from ..progress import is_animated, say

    asked = named(read_prompts(prompts, limit=limit, instruction=instruction), prompts.stem)
    known = recorded_ids(output)
    left = {name: conversation for name, conversation in asked.items() if name not in known}
    say(f"{len(left)} prompts to record, {len(asked) - len(left)} recorded already")
    if not left:
        return
    with Ouroboros.from_pretrained(model, device=device, dtype=dtype) as ouroboros:
        made = traces(ouroboros, left, category or prompts.stem, max_new_tokens)
        console = Console(stderr=True)
        with output.open("a", encoding="utf-8") as file:
            for trace in track(made, "recording", len(left), console=console, disable=not is_animated(console)):
                write_trace(file, trace)


def named(conversations: list[Conversation], file_name: str) -> dict[str, Conversation]:
    """Conversations by ids that are unique in the file, and with those of other files too."""
    found: dict[str, Conversation] = {}
    for conversation in conversations:
        name = conversation.name if "/" in conversation.name else f"{file_name}/{conversation.name}"
        copies = sum(other == name or other.startswith(f"{name}#") for other in found)
        found[f"{name}#{copies + 1}" if copies else name] = conversation
    return found


def traces(ouroboros: Ouroboros, asked: dict[str, Conversation], category: str, max_new_tokens: int) -> Iterator[Trace]:
    """One trace per conversation, as they are made; one that leaves no room for an answer is named and passed over."""
    from ..bench.prompts import encode
    from ..bench.traces import Trace

    for name, conversation in asked.items():
        prompt_ids = encode(ouroboros, conversation.messages)
        limit = min(max_new_tokens, (ouroboros.context_length or len(prompt_ids) + max_new_tokens) - len(prompt_ids))
        if limit < 1:
            click.echo(f"{name}: {len(prompt_ids)} tokens leave no room for an answer; passed over", err=True)
            continue
        token_ids, top_ids, top_probs = answer(ouroboros.model, prompt_ids, limit)
        yield Trace(name, conversation.category or category, tuple(prompt_ids), token_ids, top_ids, top_probs)


def answer(
    model: Any, prompt_ids: list[int], max_new_tokens: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[tuple[float, ...], ...]]:
    """What the model's own `generate` says greedily; per token the likeliest ids there, and their probabilities."""
    import torch
    from transformers import LogitsProcessorList

    likeliest = Likeliest()
    ids = torch.tensor([prompt_ids], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        # One prompt is never padded; naming a token keeps the library from warning that it has to choose one.
        pad_token_id=model.generation_config.pad_token_id or 0,
        logits_processor=LogitsProcessorList([likeliest]),
    )
    return tuple(output[0, len(prompt_ids) :].tolist()), tuple(likeliest.ids), tuple(likeliest.probs)


class Likeliest:
    """A last logits processor that changes nothing and notes the likeliest tokens.

    It sees what the choice is made from, penalties of the model's configuration included, and keeps a few numbers a
    token, where `output_logits` would keep the vocabulary.
    """

    def __init__(self) -> None:
        self.ids: list[tuple[int, ...]] = []
        self.probs: list[tuple[float, ...]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        from ..bench.traces import TOP

        row = scores[0].float()
        chosen = int(row.argmax())
        best = row.topk(min(TOP, len(row))).indices.tolist()
        # Half precision has exact ties, which `topk` and `argmax` need not break alike.
        ids = [chosen, *(token_id for token_id in best if token_id != chosen)][: len(best)]
        self.ids.append(tuple(ids))
        self.probs.append(tuple(row.softmax(-1)[ids].tolist()))
        return scores
