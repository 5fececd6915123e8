"""LangChain's own conformance suites, without weights: by the model's name alone, over a tiny random model, and over
scripted replies."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from speaker import Reader

from langchain_ouroboros import ChatOuroboros
from ouroboros_llm import Ouroboros


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOuroboros

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"OUROBOROS_MODEL": "qwen2.5-0.5b-instruct"}, {}, {"model": "qwen2.5-0.5b-instruct"}

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestIntegration(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _take_tiny_ouroboros(self, tiny_ouroboros: Ouroboros) -> None:
        self.tiny_ouroboros = tiny_ouroboros

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOuroboros

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"ouroboros": self.tiny_ouroboros, "max_tokens": 20}

    # A random model calls no tools of its own accord.

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


class TestScripted(ChatModelIntegrationTests):
    """Tools, structured output and agents too: the replies are scripted, all the rest is as it is."""

    @pytest.fixture(autouse=True)
    def _take_a_reader(self) -> None:
        self.reader = Reader()

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOuroboros

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"ouroboros": self.reader}

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True
