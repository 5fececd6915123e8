"""Ask a running `transformers serve` the same thing twice in one conversation; the second time knows the phrases."""

from __future__ import annotations

import argparse
import json
import uuid
from time import perf_counter

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="DIR", help="the folder, written as it was for `transformers serve`")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--question", default="Write a Python function that returns the average of a list.")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--conversation", default=str(uuid.uuid4()), help="whose phrases; a new one unless given")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key="none", max_retries=0)
    request = dict(
        model=arguments.model,
        messages=[{"role": "user", "content": arguments.question}],
        max_tokens=arguments.max_tokens,
        extra_body={"generation_config": json.dumps({"ouroboros_conversation": arguments.conversation})},
    )

    # A server's first request of all also measures the model; it would be counted as the first time's.
    client.chat.completions.create(model=arguments.model, messages=[{"role": "user", "content": "Hi."}], max_tokens=4)
    began, streamed = perf_counter(), ""
    for chunk in client.chat.completions.create(**request, stream=True):
        piece = chunk.choices[0].delta.content or ""
        print(piece, end="", flush=True)
        streamed += piece
    print(f"\n\nfirst time, streamed: {perf_counter() - began:.2f} s")

    began = perf_counter()
    answer = client.chat.completions.create(**request)
    tokens = answer.usage.completion_tokens
    print(f"second time, whole: {perf_counter() - began:.2f} s for {tokens} tokens", end=", ")
    print("the same text" if answer.choices[0].message.content == streamed else "ANOTHER TEXT")


if __name__ == "__main__":
    main()
