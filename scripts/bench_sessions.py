"""An agent conversation of many turns, and how much of its prompts was read: `python scripts/bench_sessions.py`

The prompt grows to about `--tokens`. Prints the tokens that were read turn by turn and in total, beside what a model
without a session would read. `--check N` answers every Nth turn by `model.generate` as well and compares the tokens
(exact in float32). `--restart` saves and loads the session in the middle, as a restarted agent would.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ouroboros_llm import DecodingOptions, Ouroboros

SCOPE = "conversation:bench"
_SYSTEM = "You are an agent that looks after a warehouse. Answer in one sentence, then wait for the next report."


def report(turn: int, words: int) -> str:
    """What a tool says: different every turn, and about as long as asked."""
    return f"Report {turn}: " + " ".join(
        f"shelf {turn * 31 + n} holds {(n * turn) % 97} boxes," for n in range(words // 6)
    )


def same_as_alone(ouroboros: Ouroboros, messages: list[dict[str, str]], token_ids: Sequence[int], limit: int) -> bool:
    ids = torch.tensor([ouroboros.encode(messages)], device=ouroboros.model.device)
    mask = torch.ones_like(ids)
    output = ouroboros.model.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=False)
    return list(token_ids) == output[0, ids.shape[1] :].tolist()


def restarted(ouroboros: Ouroboros) -> Ouroboros:
    """What goes on from the session's file, and knows nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session.safetensors"
        tokens = ouroboros.save_session(SCOPE, path)
        print(f"saved {tokens} tokens in {path.stat().st_size / 1e6:.1f} MB, and went on from there")
        other = Ouroboros(ouroboros.model, ouroboros.tokenizer)
        other.load_session(SCOPE, path)
    ouroboros.close()
    return other


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="registry name, path or hub id")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=6000, help="of the last prompt, about")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--check", type=int, default=0, help="compare every Nth turn with model.generate")
    parser.add_argument("--restart", action="store_true", help="save and load the session in the middle")
    given = parser.parse_args(arguments)
    options = DecodingOptions(max_new_tokens=given.max_new_tokens)
    ouroboros = Ouroboros.from_pretrained(given.model, dtype="float32")
    per_word = len(ouroboros.encode(report(50, 600))) / 600
    words = int(max(6, (given.tokens / given.turns - given.max_new_tokens) / per_word))
    messages = [{"role": "system", "content": _SYSTEM}]
    read = plain = checked = wrong = 0
    for turn in range(given.turns):
        messages.append({"role": "user", "content": report(turn, words)})
        result = ouroboros.generate(messages, scope=SCOPE, options=options)
        usage = result.usage
        read, plain = read + usage.prompt_tokens - usage.cached_tokens, plain + usage.prompt_tokens
        print(f"turn {turn + 1}: prompt {usage.prompt_tokens}, read {usage.prompt_tokens - usage.cached_tokens}")
        if given.check and turn % given.check == given.check - 1:
            checked += 1
            wrong += not same_as_alone(ouroboros, messages, result.token_ids, given.max_new_tokens)
        messages.append({"role": "assistant", "content": result.text})
        if given.restart and turn == given.turns // 2:
            ouroboros = restarted(ouroboros)
    print(f"last prompt {usage.prompt_tokens} tokens; read {read} in all, {read / usage.prompt_tokens:.2f} times that")
    print(f"without sessions {plain}, {plain / usage.prompt_tokens:.1f} times; keys and values {ouroboros.kv_usage}")
    if given.check:
        print(f"{checked} turns compared with the model alone, {wrong} differ")
    ouroboros.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
