"""Documents that answers may quote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llama_index.core.schema import BaseNode

from ouroboros_llm import OptionError
from ouroboros_llm.phrase_pool.corpus import Indexed
from ouroboros_llm.scopes import corpus_of

from .documents import ids_of, shown, texts_by_document
from .structured import StructuredPrediction


class DocumentQuoting(StructuredPrediction):
    """The corpus of an LLM: what is put there, and taken out again."""

    def index_documents(
        self, nodes: Sequence[BaseNode], *, corpus_scope: str | None = None, show_progress: bool = False
    ) -> Indexed:
        """Let answers quote documents: put what they say into the corpus, where every conversation over it finds it.

        Documents that are there and say the same cost next to nothing, those that say something else replace what they
        said. Loads the model, for its tokenizer.

        Args:
            nodes: documents, or all nodes of some: what belongs to one document has its `ref_doc_id`.
            corpus_scope: in place of that of the constructor.
            show_progress: show a bar.

        Raises:
            OptionError: no corpus is named. StoreError: the store fails.
        """
        documents = texts_by_document(nodes)
        steps = shown(documents, show_progress)
        indexed = self.load().index_documents(
            documents, scope=self._corpus(corpus_scope), advance=lambda _: next(steps, None)
        )
        next(steps, None)  # the bar is full
        return indexed

    def remove_documents(
        self, documents: str | BaseNode | Iterable[str | BaseNode], *, corpus_scope: str | None = None
    ) -> int:
        """Take documents out of the corpus again, for all models with which they were indexed.

        Args:
            documents: their ids (`ref_doc_id` of their nodes), or documents or nodes themselves.

        Returns:
            How many there were.
        """
        return int(self.load().remove_documents(ids_of(documents), scope=self._corpus(corpus_scope)))

    def _corpus(self, name: str | None) -> str:
        chosen = name or self.corpus_scope
        if not chosen:
            raise OptionError(
                "corpus_scope must name the corpus, for example 'manuals'; pass it here or to the constructor"
            )
        return corpus_of(chosen)
