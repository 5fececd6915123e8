"""The loop of Ouroboros (arXiv 2402.13720) with this library's own parts, without weights: it runs in a second.

A scripted target model wants to write three messages of an agent, word by word. A drafter proposes phrases that it
wrote before, as a draft tree; the target verifies the tree in one forward pass; what it wrote and what was rejected
but right goes into the phrase pool. The third message, which says nothing new, takes a few passes.
"""

from __future__ import annotations

import torch

from ouroboros_llm import MemoryPool
from ouroboros_llm.decoding.decoder import Decoder
from ouroboros_llm.decoding.drafter import Round
from ouroboros_llm.decoding.sampling import Sampler
from ouroboros_llm.drafting.phrases import PhraseSource, RunningText
from ouroboros_llm.drafting.tree_drafter import TreeDrafter
from ouroboros_llm.target_model.scripted import ScriptedTarget

MESSAGES = (
    "call search with query weather in Oslo . the result is rain . answer : it rains in Oslo .",
    "call search with query weather in Rome . the result is sun . answer : it is sunny in Rome .",
    "call search with query weather in Oslo . the result is sun . answer : it is sunny in Oslo .",
)
WORDS = sorted({word for message in MESSAGES for word in message.split()} | {"<start>"})
IDS = {word: number for number, word in enumerate(WORDS)}


def target_for(message: str) -> ScriptedTarget:
    """A target model whose likeliest next word is always the message's; after anything else it likes a full stop."""
    script = ("<start>", *message.split())

    def logits_after(token_ids: tuple[int, ...]) -> torch.Tensor:
        text = tuple(WORDS[token_id] for token_id in token_ids)
        follows = script[len(text)] if text == script[: len(text)] and len(text) < len(script) else "."
        return torch.eye(len(WORDS))[IDS[follows]]

    return ScriptedTarget(logits_after)


def show(number: int, round: Round) -> None:
    """Print a draft tree's guesses, and what the target made of them."""
    drafted = [WORDS[token_id] for token_id in round.draft.token_ids[1:]]
    emitted = " ".join(WORDS[token_id] for token_id in round.token_ids)
    print(f"  pass {number}: drafted {len(drafted):2d}, accepted {len(round.accepted):2d} -> {emitted}")
    if drafted:
        print(f"          the draft tree held: {' '.join(drafted)}")


def write(message: str, pool: MemoryPool) -> int:
    """Let the target write a message; the passes that it took."""
    drafter = TreeDrafter([RunningText(), PhraseSource("phrases", pool, learns=True)])
    decoder = Decoder(target_for(message), drafter, width=16)
    rounds = list(decoder.rounds([IDS["<start>"]], Sampler(), limit=len(message.split())))
    for number, round in enumerate(rounds, 1):
        show(number, round)
    token_ids = [token_id for round in rounds for token_id in round.token_ids]
    assert [WORDS[token_id] for token_id in token_ids] == message.split(), "lossless: the target's own words"
    pool.add(token_ids)
    return len(rounds)


def main() -> None:
    pool = MemoryPool()
    for message in MESSAGES:
        print(f"the target writes: {message}")
        passes = write(message, pool)
        words = len(message.split())
        print(f"  {words} words in {passes} passes, mean acceptance length {words / passes:.1f}; ", end="")
        print(f"the pool holds {pool.stats.tokens} tokens\n")


if __name__ == "__main__":
    main()
