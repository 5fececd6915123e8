"""Checks of one model: what it verifies, what it takes, how fast it is, and whether it answers."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from .checks import Check, size

if TYPE_CHECKING:
    from ..ouroboros import Ouroboros

PROMPT = "Say hello."
ANSWER_TOKENS = 12
_PASSES, _READ = 3, 64
"""Times that passes are timed, and tokens of a prompt that is read."""
_VERIFIES = {"tree": "draft trees", "chain": "draft chains", "none": "no drafts"}


def drafts(ouroboros: Ouroboros) -> Check:
    """Say which drafts a model verifies, and why no wider ones."""
    prepared = ouroboros._prepared
    probe = prepared.probe
    facts = {
        "drafts": probe.branching,
        "reason": probe.reason or None,
        "margin": probe.margin,
        "passes": "static" if prepared.way.static else "eager",
        "batches": prepared.packer is not None,
    }
    text = f"verifies {_VERIFIES[probe.branching]}" + (f", because {probe.reason}" if probe.reason else "")
    shape = "of fixed shape, which won a race here" if prepared.way.static else "of the library's own forward"
    text += f"; passes {shape}{', several texts in one where that pays' if facts['batches'] else ''}"
    return Check("drafts", "warning" if probe.branching == "none" else "ok", text, facts)


def template(ouroboros: Ouroboros) -> Check:
    """Say what prompts a model takes."""
    from ..chat.template_support import takes_system, takes_tools

    tokenizer = ouroboros.tokenizer
    has_template = bool(tokenizer.chat_template)
    facts = {
        "context_length": ouroboros.context_length,
        "chat_template": has_template,
        "tools": has_template and takes_tools(tokenizer),
        "system": has_template and takes_system(tokenizer),
    }
    takes = [name for name in ("tools", "system") if facts[name]]
    context = f"{facts['context_length']:,} tokens of context" if facts["context_length"] else "a context without limit"
    if not has_template:
        return Check("prompts", "warning", f"{context}; no chat template, so prompts are text, not messages", facts)
    also = f" with {' and '.join(takes)}" if takes else " without tools and system messages"
    return Check("prompts", "ok", f"{context}; a chat template{also}", facts)


def memory(ouroboros: Ouroboros) -> Check:
    """Add up the weights and the KV cache of a full context."""
    from ..sessions.device_memory import free_bytes

    model, token_bytes = ouroboros.model, ouroboros._prepared.probe.token_bytes
    held = sum(weight.nbytes for weight in model.parameters())
    context = ouroboros.context_length
    full = token_bytes * context if token_bytes and context else None
    free = free_bytes(model.device)
    facts = {"weights_bytes": held, "token_bytes": token_bytes, "context_bytes": full, "free_bytes": free}
    text = f"weights {size(held)} ({str(model.dtype).removeprefix('torch.')})"
    if full is not None and context:
        text += f", KV cache {size(full)} for all of the context ({token_bytes:,} bytes a token)"
    if free is not None and full is not None and full > free:
        return Check("memory", "warning", f"{text}, of which {size(free)} are free; keep prompts shorter", facts)
    return Check("memory", "ok", text, facts)


def speed(ouroboros: Ouroboros) -> Check:
    """Time passes over one token and deduce rates by mean acceptance length."""
    from ..decoding.draft_tree import DraftTree
    from ..target_model.prepared import locked

    prepared = ouroboros._prepared
    target: Any = prepared.start()
    with locked(prepared):
        began = perf_counter()
        target.prefill((1,) * _READ)[0, 0].item()
        read = _READ / (perf_counter() - began)
        target.keep((0,))
        for width in (1, 8 if prepared.probe.branching != "none" else 1) * _PASSES:
            target.verify(DraftTree.chain((1,) * width))[0, 0].item()
            target.keep((0,)) if prepared.probe.branching == "none" else target.rewind(_READ)
    one = prepared.pass_times.one
    if one is None:
        return Check("speed", "ok", "known after the first answers", {})
    # Drafts of eight nodes stand for what acceptance lengths of two to four take.
    wide = one * prepared.pass_times.cost(8)
    rates = {"1": 1 / one, "2": 2 / wide, "4": 4 / wide}
    facts = {
        "prefill_tokens_per_second": read,
        "pass_seconds": one,
        "cost_of_width_8": wide / one,
        "tokens_per_second_by_acceptance_length": rates,
    }
    drafted = f"{rates['2']:.1f} and {rates['4']:.1f} where drafts of 8 tokens bring 2 and 4 a pass"
    return Check(
        "speed",
        "ok",
        f"{rates['1']:.1f} tokens a second plain at this moment; {drafted}; prompts are read at {read:.0f}",
        facts,
    )


def answer(ouroboros: Ouroboros) -> Check:
    """Ask a model something."""
    from ..options import DecodingOptions

    prompt: Any = [{"role": "user", "content": PROMPT}] if ouroboros.tokenizer.chat_template else PROMPT
    result = ouroboros.generate(
        prompt, scope="conversation:doctor", options=DecodingOptions(max_new_tokens=ANSWER_TOKENS)
    )
    facts = {"prompt": PROMPT, "text": result.text, "completion_tokens": result.usage.completion_tokens}
    if not result.token_ids:
        return Check("answer", "failure", "the model said nothing", facts)
    return Check("answer", "ok", f"{PROMPT!r} -> {result.text.strip()!r}", facts)


CHECKS = {"drafts": drafts, "prompts": template, "memory": memory, "speed": speed, "answer": answer}
