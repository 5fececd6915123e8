"""LlamaIndex's nodes and documents as texts that answers may quote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from llama_index.core.schema import BaseNode, MetadataMode, TextNode
from llama_index.core.utils import get_tqdm_iterable

from ouroboros_llm import OptionError


def texts_by_document(nodes: Sequence[BaseNode]) -> dict[str, list[str]]:
    """What nodes say, by the documents they come from, without what they repeat of each other.

    Raises:
        OptionError: something else than nodes and documents.
    """
    by_document: dict[str, list[BaseNode]] = {}
    for node in nodes:
        by_document.setdefault(id_of(node), []).append(node)
    return {id: list(_parts(of_document)) for id, of_document in by_document.items()}


def ids_of(documents: str | BaseNode | Iterable[str | BaseNode]) -> list[str]:
    """Ids of documents, given as they are, or by documents or nodes of them."""
    several = [documents] if isinstance(documents, (str, BaseNode)) else documents
    return [one if isinstance(one, str) else id_of(one) for one in several]


def id_of(node: BaseNode) -> str:
    """The id of the document that a node comes from, or its own."""
    if not isinstance(node, BaseNode):
        raise OptionError(f"nodes must be nodes or documents of LlamaIndex, but got {type(node).__name__}")
    return node.ref_doc_id or node.node_id


def shown(documents: dict[str, list[str]], show_progress: bool) -> Iterator[int]:
    """A step for each document, with a bar where that is wanted."""
    return iter(get_tqdm_iterable(range(len(documents)), show_progress, "Indexing documents for drafts"))


def _parts(nodes: Sequence[BaseNode]) -> Iterator[str]:
    """Splitters let chunks overlap, and say where in the document they stand."""
    end = 0
    for node in sorted(nodes, key=lambda node: getattr(node, "start_char_idx", None) or 0):
        text = node.get_content(metadata_mode=MetadataMode.NONE)
        start = node.start_char_idx if isinstance(node, TextNode) else None
        if start is not None:
            known, end = max(end - start, 0), max(end, start + len(text))
            text = text[known:]
        if text:
            yield text
