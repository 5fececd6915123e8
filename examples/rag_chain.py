"""Questions about Python's standard library, answered from its own docstrings, and what phrases bought.

Run it with `python examples/rag_chain.py`. The chain looks up docstrings (BM25, in this file), puts them into the
prompt and asks the model, whose answers quote them: what it quotes is drafted from there.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
import statistics
import textwrap
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnablePassthrough
from pydantic import ConfigDict

from _table import about, arguments, conditions, percent, plain, replies, show, total
from langchain_ouroboros import ChatOuroboros

MODULES = (json, math, shutil, statistics, textwrap)
QUESTIONS = (
    "How do I copy a whole directory tree, and what does it do with symbolic links?",
    "What does textwrap.dedent do? Quote its description.",
    "Which function computes the median of grouped data, and what are its arguments?",
    "How can I remove a directory tree and handle the errors?",
    "What does statistics.quantiles return? Quote its description.",
    "How does json.dumps treat keys that are not strings?",
)
PROMPT = ChatPromptTemplate(
    [
        ("system", "Answer the question from these docstrings, in their words.\n\n{context}"),
        ("human", "{question}"),
    ]
)


class BM25(BaseRetriever):
    """The documents that share the rarest words with a question (Okapi BM25, k1=1.5, b=0.75)."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    documents: Sequence[Document]
    words: Sequence[Counter[str]]
    k: int = 2

    @classmethod
    def of(cls, documents: Sequence[Document]) -> BM25:
        return cls(documents=documents, words=[Counter(_words(document.page_content)) for document in documents])

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        mean = sum(words.total() for words in self.words) / len(self.words)
        scores = [sum(self._score(word, words, mean) for word in set(_words(query))) for words in self.words]
        best = sorted(range(len(scores)), key=lambda number: -scores[number])
        return [self.documents[number] for number in best[: self.k]]

    def _score(self, word: str, words: Counter[str], mean: float) -> float:
        holding = sum(word in other for other in self.words)
        rarity = math.log(1 + (len(self.words) - holding + 0.5) / (holding + 0.5))
        often = words[word]
        return rarity * often * 2.5 / (often + 1.5 * (0.25 + 0.75 * words.total() / mean))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def docstrings() -> list[Document]:
    """What the modules' public functions say of themselves."""
    found = []
    for module in MODULES:
        for name in module.__all__ if hasattr(module, "__all__") else dir(module):
            function = getattr(module, name)
            text = inspect.getdoc(function) or ""
            if callable(function) and not inspect.isclass(function) and len(text) > 60:
                found.append(Document(f"{module.__name__}.{name}: {text}", metadata={"module": module.__name__}))
    return found


def chain_of(model: ChatOuroboros) -> Runnable[str, AIMessage]:
    """From a question to the model's message."""
    context = BM25.of(docstrings()) | (lambda found: "\n\n".join(document.page_content[:1200] for document in found))
    return {"context": context, "question": RunnablePassthrough()} | PROMPT | model


def main(given: Namespace) -> None:
    model = ChatOuroboros(
        model=given.model, dtype=given.dtype, store=given.store, scope="conversation:rag", max_tokens=given.max_tokens
    )
    ours, alone = chain_of(model), chain_of(plain(model))
    rows: list[tuple[object, ...]] = []
    said: list[AIMessage] = []
    plainly: list[AIMessage] = []
    for number, question in enumerate(QUESTIONS[: given.tasks], 1):
        message, reference = ours.invoke(question), alone.invoke(question)
        print(f"\n> {question}\n\n{message.text}", flush=True)
        rows.append(_row(str(number), [message], [reference]))
        said.append(message)
        plainly.append(reference)
    rows.append(_row("all", said, plainly))
    columns = ("question", "tokens", "forwards", "of plain's", "drafted from the prompt", "times plain", "same text")
    show("Answers from docstrings", columns, rows, ends="all")
    print(conditions(about(model)))
    if [message.text for message in said] != [message.text for message in plainly]:
        raise SystemExit("texts differ from those of plain decoding")


def _row(name: str, messages: Sequence[AIMessage], reference: Sequence[AIMessage]) -> tuple[object, ...]:
    mine, its = replies(messages), replies(reference)
    tokens, forwards = total(mine, "completion_tokens"), total(mine, "target_forwards")
    quoted = sum(reply.sources.get("text", 0) for reply in mine)
    ratio = sum(reply.seconds for reply in its) / sum(reply.seconds for reply in mine)
    same = sum(one.text == other.text for one, other in zip(messages, reference, strict=True))
    of_plain = percent(forwards, total(its, "target_forwards"))
    return name, tokens, forwards, of_plain, quoted, f"{ratio:.2f}", f"{same}/{len(messages)}"


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--tasks", type=int, default=len(QUESTIONS), help="questions, from the first [%(default)s]")
    parser.add_argument("--max-tokens", type=int, default=128, help="per reply, at most [%(default)s]")
    main(parser.parse_args())
