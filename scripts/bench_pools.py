"""Measure a pool of a million tokens: `python scripts/bench_pools.py TRACES...`

The pool holds the answers and prompts of the traces again and again, each time with one token in twenty changed, until
it is full. Prints load time, memory, and how long drafts of 32 nodes take at places of the answers.
"""

from __future__ import annotations

import random
import sys
import tracemalloc
from statistics import median, quantiles
from time import perf_counter

from ouroboros_llm.bench.traces import read_traces
from ouroboros_llm.decoding.drafter import Budget
from ouroboros_llm.drafting.calibration import Calibration
from ouroboros_llm.drafting.phrases import PhraseSource, RunningText
from ouroboros_llm.drafting.tree_drafter import TreeDrafter
from ouroboros_llm.phrase_pool.memory import MemoryPool, Run

TOKENS = 1_000_000
DRAFTS = 2000
BUDGET = Budget(width=32, depth=100)


def runs(texts: list[tuple[int, ...]], generator: random.Random) -> list[Run]:
    vocabulary = sorted({token_id for text in texts for token_id in text})
    found, size = [], 0
    while size < TOKENS:
        text = generator.choice(texts)
        changed = [generator.choice(vocabulary) if generator.random() < 0.05 else token_id for token_id in text]
        found.append(Run(changed))
        size += len(changed)
    return found


def main() -> None:
    generator = random.Random(0)
    traces = [trace for path in sys.argv[1:] for trace in read_traces(path)]
    batch = runs([trace.token_ids for trace in traces] + [trace.prompt_ids for trace in traces], generator)

    tracemalloc.start()
    pool = MemoryPool(capacity=2 * TOKENS)
    pool.add_all(batch)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    again, began = MemoryPool(capacity=2 * TOKENS), perf_counter()
    again.add_all(batch)
    seconds = perf_counter() - began
    print(f"{pool.stats.tokens:,} tokens in {pool.stats.runs:,} runs")
    print(f"memory: {held / pool.stats.tokens:.1f} bytes per token, {pool.nbytes / pool.stats.tokens:.1f} of it index")
    print(f"loading: {seconds / pool.stats.tokens * 1e6:.2f} s per million tokens")

    calibration, times, widths = Calibration(), [], []
    while len(times) < DRAFTS:
        trace = generator.choice(traces)
        end = generator.randrange(1, len(trace.token_ids))
        context = [*trace.prompt_ids, *trace.token_ids[:end]]
        blend = TreeDrafter([RunningText(), PhraseSource("phrases", pool)], calibration)
        blend.open(context[:-end])
        blend.sources[0].pool.extend(context[-end:])  # type: ignore[attr-defined]
        began = perf_counter()
        draft = blend.draft(context, BUDGET)
        times.append((perf_counter() - began) * 1e3)
        widths.append(draft.width)
    print(
        f"drafts of up to 32 nodes ({sum(widths) / len(widths):.1f} on average): median {median(times):.2f} ms, "
        f"p99 {quantiles(times, n=100)[-1]:.2f} ms"
    )


if __name__ == "__main__":
    main()
