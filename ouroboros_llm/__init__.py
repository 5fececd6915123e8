"""Local Hugging Face models, several times faster and not one token different."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .custom_generate import custom_generate
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
    from .grammar.base import Grammar
    from .options import DecodingOptions
    from .ouroboros import Ouroboros
    from .phrase_pool.base import Phrase, PhrasePool, PoolSource
    from .phrase_pool.documents import documents_pool, read_documents
    from .phrase_pool.memory import MemoryPool
    from .progress import show_progress
    from .results import DecodingStatistics, GenerationResult, StreamChunk, Usage
    from .scopes import ouroboros_scope
    from .serving.stream import Stream
    from .sessions.prefix_cache import KVUsage, kv_usage, limit_kv_bytes

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
    "PoolSource",
    "PromptError",
    "QueueFullError",
    "RequestTimeoutError",
    "SnapshotError",
    "StoreError",
    "Stream",
    "StreamChunk",
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
_NAMES = {
    "custom_generate": ("custom_generate",),
    "errors": (
        "ContextLengthError",
        "LibraryVersionError",
        "MemoryLimitError",
        "MissingExtraError",
        "ModelDownloadError",
        "ModelError",
        "OptionError",
        "OuroborosError",
        "PromptError",
        "QueueFullError",
        "RequestTimeoutError",
        "SnapshotError",
        "StoreError",
        "TokenizerMismatchError",
        "UnknownModelError",
    ),
    "grammar.base": ("Grammar",),
    "options": ("DecodingOptions",),
    "ouroboros": ("Ouroboros",),
    "phrase_pool.base": ("Phrase", "PhrasePool", "PoolSource"),
    "phrase_pool.documents": ("documents_pool", "read_documents"),
    "phrase_pool.memory": ("MemoryPool",),
    "progress": ("show_progress",),
    "results": ("DecodingStatistics", "GenerationResult", "StreamChunk", "Usage"),
    "scopes": ("ouroboros_scope",),
    "serving.stream": ("Stream",),
    "sessions.prefix_cache": ("KVUsage", "kv_usage", "limit_kv_bytes"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
