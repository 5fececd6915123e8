"""Local models in LlamaIndex, several times faster and not one token different."""

try:
    import llama_index.core  # noqa: F401  (only to name the extra where it is missing)
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("llama_index"):
        raise
    from ouroboros_llm import MissingExtraError

    raise MissingExtraError("llama-index-core", "llama-index") from error

from ouroboros_llm import ouroboros_scope

from .base import OuroborosLLM

__all__ = ["OuroborosLLM", "ouroboros_scope"]
