"""Local Hugging Face models, several times faster and not one token different."""

from .errors import (
    ContextLengthError,
    MissingExtraError,
    ModelDownloadError,
    ModelError,
    OptionError,
    OuroborosError,
    PromptError,
    StoreError,
    TokenizerMismatchError,
    UnknownModelError,
)
from .generation import custom_generate
from .options import DecodingOptions
from .ouroboros import Ouroboros
from .memory_pool import MemoryPool
from .phrases import Phrase, PhrasePool, PoolSource
from .statistics import DecodingStatistics, GenerationResult, Piece, Usage

__version__ = "0.1.0"

__all__ = [
    "ContextLengthError",
    "DecodingOptions",
    "DecodingStatistics",
    "GenerationResult",
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
    "StoreError",
    "TokenizerMismatchError",
    "UnknownModelError",
    "Usage",
    "__version__",
    "custom_generate",
]
