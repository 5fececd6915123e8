"""LangChain's integration suite, and a hundred forced calls, over a model that is named: `make test-model`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests

from langchain_ouroboros import ChatOuroboros

MODEL, DTYPE = os.environ.get("OUROBOROS_TEST_MODEL"), os.environ.get("OUROBOROS_TEST_DTYPE", "bfloat16")

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(MODEL is None, reason="no model named in $OUROBOROS_TEST_MODEL (`make test-model`)"),
]


class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOuroboros

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "dtype": DTYPE, "store": None, "max_tokens": 200}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True


TEXT = {"type": "string", "maxLength": 20}
KINDS: dict[str, dict[str, Any]] = {
    "city": TEXT,
    "days": {"type": "integer", "minimum": 1, "maximum": 30},
    "größe": {"enum": ["klein", "mittel", "groß"]},
    "色": {"enum": ["赤", "青", "緑"]},
    "share": {"type": "number", "minimum": 0, "maximum": 1},
    "tags": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3},
    "limit": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 99}]},
    "address": {
        "type": "object",
        "properties": {"street": TEXT, "number": {"type": ["integer", "null"], "maximum": 500, "minimum": 0}},
        "required": ["street", "number"],
    },
    "stops": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"name": TEXT, "kind": {"enum": ["bus", "tram"]}},
            "required": ["name", "kind"],
        },
        "maxItems": 2,
    },
    "either": {
        "anyOf": [
            {"type": "object", "properties": {"email": {"type": "string", "format": "email"}}, "required": ["email"]},
            {
                "type": "object",
                "properties": {"id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}},
                "required": ["id"],
            },
        ]
    },
}
QUESTIONS = [
    "Plan three days in Köln for two people, please.",
    "次の駅はどこですか。赤い電車に乗りたいです。",
    "Say hello.",
    "My friend said \"it's 5 o'clock \\ somewhere\" and left. Where to?",
]


def tools() -> Iterator[tuple[dict[str, Any], str]]:
    """A hundred tools of different parameters, and something to say with each."""
    names = list(KINDS)
    for number in range(100):
        # A name that comes twice is one parameter.
        chosen = list(dict.fromkeys(names[(number * step + step) % len(names)] for step in range(1, 2 + number % 4)))
        parameters = {"type": "object", "properties": {name: KINDS[name] for name in chosen}, "required": chosen}
        function = {"name": f"tool_{number}", "description": f"Takes {', '.join(chosen)}.", "parameters": parameters}
        yield {"type": "function", "function": function}, QUESTIONS[number % len(QUESTIONS)]


def test_a_hundred_forced_calls_parse_and_validate() -> None:
    model = ChatOuroboros(model=MODEL, dtype=DTYPE, store=None, max_tokens=300)
    tokens = forwards = 0
    seen = set()
    for number, (tool, question) in enumerate(tools()):
        message: Any = model.bind_tools([tool], tool_choice="any").invoke(question, temperature=number % 3 / 2)
        (call,) = message.tool_calls
        assert (call["name"], message.invalid_tool_calls) == (tool["function"]["name"], [])
        jsonschema.validate(call["args"], tool["function"]["parameters"])
        seen.add(json.dumps(call["args"], ensure_ascii=False))
        tokens += message.usage_metadata["output_tokens"]
        forwards += message.response_metadata["ouroboros"]["target_forwards"]
    assert number == 99
    print(f"{len(seen)} different calls, {tokens} tokens in {forwards} passes")
