"""The suite for LLMs of LlamaIndex: `OuroborosLLM` over a scripted stand-in and over a tiny model, and LlamaIndex's own
stand-ins, so that the suite is fair."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import byte_tokenizer, tiny_model
from llama_index.core.llms import mock
from llm_conformance import QUESTION, LLMConformance, no_other_llm, recorder
from speaker import HERMES, Speaker, call
from test_llama_index_tools import stand_in

from llama_index.llms.ouroboros import OuroborosLLM
from ouroboros_llm import Ouroboros

__all__ = ["no_other_llm", "recorder"]


def reply(prompt: Any) -> str:
    """A call where the suite asks for one; else text in which it matters what was asked."""
    asked = prompt[-1]["content"] if isinstance(prompt, list) else prompt
    if asked == QUESTION:
        return call("ping", '{"host": "tail"}')
    return f"Well: {asked[:12]!r} it is."


class TestScripted(LLMConformance):
    @pytest.fixture
    def llm(self) -> OuroborosLLM:
        speaker = Speaker(reply)
        speaker.context_length = 8192
        return OuroborosLLM(ouroboros=stand_in(speaker))


class TestWithoutTemplate(LLMConformance):
    calls_tools = False

    @pytest.fixture
    def llm(self) -> OuroborosLLM:
        speaker = Speaker(reply, template=None)
        speaker.context_length = 8192
        return OuroborosLLM(ouroboros=stand_in(speaker))

    def test_is_an_llm(self, llm: Any) -> None:
        assert llm.class_name() == "OuroborosLLM"


class TestTinyModel(LLMConformance):
    """A random model: what it says is no text, but it must say it."""

    @pytest.fixture
    def llm(self) -> OuroborosLLM:
        tokenizer = copy.deepcopy(byte_tokenizer())
        tokenizer.chat_template = HERMES
        return OuroborosLLM(ouroboros=Ouroboros(tiny_model(context=8192), tokenizer), max_tokens=80)

    @pytest.fixture(autouse=True)
    def only_where_a_call_is_forced(self, request: pytest.FixtureRequest) -> None:
        if request.node.originalname in ("test_tools", "test_results_of_tools", "test_agents"):
            pytest.skip("a random model calls tools where it must, and then always")


# LlamaIndex's own, which show that the suite asks for nothing special; older ones do less.
recent_mocks = pytest.mark.skipif(
    not hasattr(mock.MockLLM, "to_payload"), reason="the mocks of this llama-index-core do less than the suite asks for"
)


@recent_mocks
class TestMockLLM(LLMConformance):
    cumulative = reports_usage = calls_tools = frees_the_loop = reports_once = False

    @pytest.fixture(params=[True, False], ids=["chat", "text"])
    def llm(self, request: pytest.FixtureRequest) -> mock.MockLLM:
        return mock.MockLLM(is_chat_model=request.param)


@recent_mocks
class TestMockFunctionCallingLLM(LLMConformance):
    reports_usage = frees_the_loop = reports_once = serializes = False

    @pytest.fixture
    def llm(self) -> mock.MockFunctionCallingLLM:
        return mock.MockFunctionCallingLLM(is_chat_model=True)
