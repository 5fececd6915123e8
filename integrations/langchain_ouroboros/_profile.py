"""What LangChain's agents want to know of a model before they call it."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import ModelProfile

from ouroboros_llm.chat.template_support import detect_template_support
from ouroboros_llm.models.loading import local_context_length


def profile_of(model: str, ouroboros: Any) -> ModelProfile:
    """The profile of a model, as far as it is known without loading it."""
    profile = ModelProfile(
        name=model,
        open_weights=True,
        text_inputs=True,
        text_outputs=True,
        temperature=True,
        tool_calling=True,
        tool_choice=True,
        tool_call_streaming=True,
        # Agents would then offer tools and a schema at once, where text cannot be kept to the schema. As it is they
        # make a tool of the schema, whose calls are.
        structured_output=False,
    )
    length = local_context_length(model) if ouroboros is None else getattr(ouroboros, "context_length", None)
    if length is not None:
        profile["max_input_tokens"] = length - 1
        profile["max_output_tokens"] = length - 1
    if ouroboros is not None:
        sections = detect_template_support(ouroboros).format.sections
        profile["reasoning_output"] = any(section.kind == "reasoning" for section in sections)
    return profile
