"""Local Hugging Face models, several times faster and not one token different."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drafting.retrieval import documents_pool, read_documents
    from .errors import (
        ContextLengthError,
        LibraryVersionError,
        MemoryLimitError,
        MissingExtraError,
        ModelDownloadError,
        ModelError,
        OptionError,
        OuroborosError,
        PromptError,
        QueueFullError,
        RequestTimeoutError,
        SnapshotError,
        StoreError,
        TokenizerMismatchError,
        UnknownModelError,
    )
    from .generation import custom_generate
    from .grammar import Grammar
    from .memory_pool import MemoryPool
    from .options import DecodingOptions
    from .ouroboros import Ouroboros
    from .phrases import Phrase, PhrasePool, PoolSource
    from .progress import show_progress
    from .scopes import ouroboros_scope
    from .statistics import DecodingStatistics, GenerationResult, Piece, Usage
    from .stream import Stream
    from .workspaces import KVUsage, kv_usage, limit_kv_bytes

__version__ = "0.1.0"

__all__ = [
    "ContextLengthError",
    "DecodingOptions",
    "DecodingStatistics",
    "GenerationResult",
    "Grammar",
    "KVUsage",
    "LibraryVersionError",
    "MemoryLimitError",
    "MemoryPool",
    "MissingExtraError",
    "ModelDownloadError",
    "ModelError",
    "OptionError",
    "Ouroboros",
    "OuroborosError",
    "Phrase",
    "PhrasePool",
    "Piece",
    "PoolSource",
    "PromptError",
    "QueueFullError",
    "RequestTimeoutError",
    "SnapshotError",
    "StoreError",
    "Stream",
    "TokenizerMismatchError",
    "UnknownModelError",
    "Usage",
    "__version__",
    "custom_generate",
    "documents_pool",
    "kv_usage",
    "limit_kv_bytes",
    "ouroboros_scope",
    "read_documents",
    "show_progress",
]

# Imported on first use, so that `ouroboros --help` does not wait for torch.
_MODULES = {
    "ContextLengthError": "errors",
    "LibraryVersionError": "errors",
    "MemoryLimitError": "errors",
    "MissingExtraError": "errors",
    "ModelDownloadError": "errors",
    "ModelError": "errors",
    "OptionError": "errors",
    "OuroborosError": "errors",
    "PromptError": "errors",
    "SnapshotError": "errors",
    "QueueFullError": "errors",
    "RequestTimeoutError": "errors",
    "StoreError": "errors",
    "TokenizerMismatchError": "errors",
    "UnknownModelError": "errors",
    "custom_generate": "generation",
    "Grammar": "grammar",
    "documents_pool": "drafting.retrieval",
    "read_documents": "drafting.retrieval",
    "DecodingOptions": "options",
    "Ouroboros": "ouroboros",
    "MemoryPool": "memory_pool",
    "Phrase": "phrases",
    "PhrasePool": "phrases",
    "PoolSource": "phrases",
    "ouroboros_scope": "scopes",
    "show_progress": "progress",
    "DecodingStatistics": "statistics",
    "GenerationResult": "statistics",
    "Piece": "statistics",
    "Usage": "statistics",
    "KVUsage": "workspaces",
    "kv_usage": "workspaces",
    "limit_kv_bytes": "workspaces",
    "Stream": "stream",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
