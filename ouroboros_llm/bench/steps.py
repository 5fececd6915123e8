"""What passes of a model take, by width, beside the limit of the device and the library's own passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..decoding.decoder import Decoder, likeliest_tokens
from ..decoding.draft_tree import DraftTree, TreeBuilder
from ..decoding.drafter import NoDrafts
from ..decoding.sampling import Sampler
from ..decoding.target import DeviceAcceptance, GreedyAcceptance, Pass
from ..decoding.verification import accept
from ..drafting.token_recycling import KEPT
from ..target_model.latency import WIDTHS
from ..target_model.prepared import PreparedModel, prepare
from ..transformers_api import DynamicCache, forward_signature
from .device import profile, seconds_of
from .shapes import bytes_read

OURS, LIBRARY = "ours", "transformers"


def measure_steps(
    model: PreTrainedModel, *, length: int, repeats: int, bytes_per_second: float, tokens: int
) -> dict[str, Any]:
    """Passes over each of `WIDTHS` tokens behind a text, tokens per second without drafts, and what rounds consist of.

    Args:
        length: tokens of the text.
        repeats: of each pass.
        bytes_per_second: what the device was seen to read at best.
        tokens: of the answers that rates are taken from.
    """
    prepared = prepare(model, "static")
    text = [1 + number % (model.config.vocab_size - 1) for number in range(length)]
    ours, library = _our_step(prepared, text), _library_step(model, text)
    steps = {
        width: seconds_of({OURS: partial(ours, width), LIBRARY: partial(library, width)}, model.device, repeats)
        for width in WIDTHS
    }
    nbytes = bytes_read(model, length)
    limit = nbytes / bytes_per_second
    return {
        "fused": dict(prepared.way.static.fused) if prepared.way.static else {},
        "bytes_read": nbytes,
        "limit_seconds": limit,
        "steps": {str(width): {**seconds, "times_limit": seconds[OURS] / limit} for width, seconds in steps.items()},
        "cost_curve": {str(width): steps[width][OURS] / steps[1][OURS] for width in WIDTHS},
        "tokens_per_second": _rates(prepared, text[:16], tokens),
        "profiles": {
            f"{OURS}, width {width}": profile(_our_round(prepared, text, width), model.device) for width in (1, 8, 32)
        }
        | {f"{LIBRARY}, width 1": profile(partial(library, 1), model.device)},
        # Known at the end alone: a pass may fail in the middle.
        "not_static": prepared.way.missed,
    }


def _our_step(prepared: PreparedModel, text: list[int]) -> Callable[[int], object]:
    target = prepared.start()
    target.prefill(text)
    target.keep((0,))

    def step(width: int) -> object:
        target.rewind(len(text))
        return target.verify(DraftTree.chain((1,) * width))

    return step


def _our_round(prepared: PreparedModel, text: list[int], width: int) -> Callable[[], object]:
    """A greedy round without drafting: verify, choose and keep. Half of the nodes are accepted, each of them behind a
    wrong guess, so that keys and values are moved."""
    target, greedy = prepared.start(), GreedyAcceptance(width, successors=KEPT)
    target.prefill(text)
    target.keep((0,))
    draft = DraftTree.root(1)
    while draft.width + 2 <= width:
        draft = _longer(draft, Pass(target, draft).logits())
        target.rewind(len(text))

    def round_() -> object:
        target.rewind(len(text))
        found = Pass(target, draft, greedy=greedy).make()
        if not isinstance(found, DeviceAcceptance):
            likeliest, successors = likeliest_tokens(found, KEPT)
            path = accept(draft, lambda node, _: likeliest[node], limit=width, end_token_ids=()).path
            found = DeviceAcceptance(likeliest, successors, path)
        target.keep(found.path)
        return found

    return round_


def _longer(draft: DraftTree, logits: torch.Tensor) -> DraftTree:
    """Two guesses more after the last node: a wrong one and what the target says."""
    last, right = draft.width - 1, int(logits[-1].argmax())
    wrong = (right + 1) % logits.shape[1]
    builder = TreeBuilder(draft.token_ids[0], draft.width + 2)
    for node in range(1, draft.width):
        builder.add(draft.parents[node], draft.token_ids[node], 1.0, "")
    for token_id in (wrong, right):
        builder.add(last, token_id, 1.0, "")
    return builder.build()


@torch.inference_mode()
def _library_step(model: PreTrainedModel, text: list[int]) -> Callable[[int], object]:
    """A pass of the library's own over a cache of its own, which then drops what was added."""
    cache: Any = DynamicCache(config=model.config)
    run = partial(forward_signature(model).call, model)
    run(torch.tensor([text], device=model.device), cache, logits_to_keep=1)

    @torch.inference_mode()
    def step(width: int) -> object:
        ids = torch.ones(1, width, dtype=torch.long, device=model.device)
        logits = run(ids, cache).logits
        cache.crop(-width)
        return logits

    return step


def _rates(prepared: PreparedModel, prompt: list[int], tokens: int) -> dict[str, float | None]:
    """Tokens per second without drafts: ours, and `generate` with the library's dynamic and its static cache, which it
    compiles for on a device; None where the clock is too coarse."""
    model: Any = prepared.model
    ids = torch.tensor([prompt], device=model.device)

    def ours(count: int) -> None:
        decoder = Decoder(prepared.start(), NoDrafts(), width=1)
        assert sum(len(round.token_ids) for round in decoder.rounds(prompt, Sampler(), limit=count)) == count

    def library(count: int, **options: Any) -> None:
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False} | options
        assert model.generate(ids, max_new_tokens=count, **given).shape[1] == len(prompt) + count

    ways: dict[str, Callable[[int], None]] = {
        OURS: ours,
        "generate": library,
        "generate, static cache": partial(library, cache_implementation="static"),
    }
    few = max(2, tokens // 4)
    runs = {(name, count): partial(way, count) for name, way in ways.items() for count in (few, few + tokens)}
    named = {f"{name} {count}": run for (name, count), run in runs.items()}
    # Of a longer and a shorter answer, so that reading the prompt is left out.
    seconds = seconds_of(named, model.device, 3)
    spent = {name: seconds[f"{name} {few + tokens}"] - seconds[f"{name} {few}"] for name in ways}
    return {name: tokens / more if more > 0 else None for name, more in spent.items()}
