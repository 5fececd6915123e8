"""What LlamaIndex is told of a model."""

from __future__ import annotations

from llama_index.core.base.llms.types import LLMMetadata
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW

from ouroboros_llm import Ouroboros
from ouroboros_llm.models.metadata import ModelMetadata
from ouroboros_llm.ouroboros import DEFAULT_MAX_NEW_TOKENS


def loaded_facts(ouroboros: Ouroboros) -> ModelMetadata:
    """The facts of a model that is loaded."""
    return ModelMetadata(
        context_length=ouroboros.context_length,
        max_new_tokens=ouroboros.model.generation_config.max_new_tokens,
        has_chat_template=bool(ouroboros.tokenizer.chat_template),
    )


def metadata_of(facts: ModelMetadata, name: str, max_tokens: int | None, context_window: int | None) -> LLMMetadata:
    """Metadata of the model called `name`; what the user set comes first."""
    window = context_window or facts.context_length or DEFAULT_CONTEXT_WINDOW
    default = facts.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    return LLMMetadata(
        context_window=window,
        # Prompts are packed into what the output leaves; a default must leave room in a small context too.
        num_output=min(max_tokens or default, window // 2),
        is_chat_model=facts.has_chat_template,
        is_function_calling_model=facts.has_chat_template,
        model_name=name,
    )
