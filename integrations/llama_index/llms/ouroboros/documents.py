"""LlamaIndex's nodes and documents as texts that answers may quote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
    """What nodes of a document say, as far as it can be put together again, without what is said twice."""
    given = {node.node_id: node for node in nodes}
    apart = [node for node in nodes if not _said_by_parent(node, given)]
    found: list[_Stretch] = []
    going_on: list[_Stretch] = []
    for node in sorted(apart, key=lambda node: _start(node) or 0):
        text, start = _text(node), _start(node)
        if start is None:
            found.append(_Stretch(0, text, [text]))
            continue
        going_on = [stretch for stretch in going_on if stretch.start + len(stretch.last) > start]
        if not any(stretch.takes(start, text) for stretch in going_on):
            going_on.append(_Stretch(start, text, [text]))
            found.append(going_on[-1])
    yield from filter(None, ("".join(stretch.texts) for stretch in found))


@dataclass
class _Stretch:
    """Nodes that overlap. Where they say that they stand is only believed where their texts agree: some parsers count
    from the beginning of the document, others from that of a part."""

    start: int
    last: str
    """The node that reaches furthest, and where it stands."""
    texts: list[str]

    def takes(self, start: int, text: str) -> bool:
        """Go on with a text, where it overlaps with this one; returns whether it does. None stands further in front."""
        place = start - self.start
        known = len(self.last) - place
        if known <= 0 or not text.startswith(self.last[place : place + len(text)]):
            return False
        if known < len(text):
            self.texts.append(text[known:])
            self.start, self.last = start, text
        return True


def _said_by_parent(node: BaseNode, given: Mapping[str, BaseNode]) -> bool:
    """Whether a hierarchy was given whole."""
    parent = given.get(node.parent_node.node_id) if node.parent_node is not None else None
    return parent is not None and parent is not node and _text(node) in _text(parent)


def _start(node: BaseNode) -> int | None:
    return node.start_char_idx if isinstance(node, TextNode) else None


def _text(node: BaseNode) -> str:
    return node.get_content(metadata_mode=MetadataMode.NONE)
