"""Ouroboros in LangChain: `ChatOuroboros` for messages, `OuroborosLLM` for plain text."""

from ouroboros_llm import MissingExtraError

try:
    from .chat_models import ChatOuroboros
    from .llms import OuroborosLLM
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "langchain_core":
        raise
    raise MissingExtraError("langchain-core", "langchain") from error

__all__ = ["ChatOuroboros", "OuroborosLLM"]
