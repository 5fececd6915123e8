"""What a model folder's `generate` becomes: the library's own method, decoding with Ouroboros.

`transformers` finds this file in the folder and puts `generate` in place of the loaded model's method, for
`from_pretrained(..., trust_remote_code=True)` and so for `transformers serve ... --trust-remote-code`.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, StoppingCriteriaList, StopStringCriteria

from ouroboros_llm import MemoryPool, OptionError, PhrasePool, PoolSource, custom_generate
from ouroboros_llm.chat.text import vocabulary_hash
from ouroboros_llm.defaults import default_store
from ouroboros_llm.phrase_pool.base import check_scope
from ouroboros_llm.phrase_pool.opening import open_pool, open_source


def generate(model: PreTrainedModel, **arguments: Any) -> Any:
    """The same tokens as without this file, several per pass.

    Args:
        arguments: those of `GenerationMixin.generate`. An attribute `ouroboros_conversation` of `generation_config`
            names whose phrases to use and to add to; without it nothing outlives the call.

    Raises:
        OptionError: an `assistant_model`, and what `ouroboros_llm.custom_generate` does not honor.
    """
    if arguments.pop("assistant_model", None) is not None:
        raise OptionError("assistant_model must be None: the drafts come from phrases; leave it out")
    streamer = arguments.pop("streamer", None)
    pool = _pool(model, getattr(arguments.get("generation_config"), "ouroboros_conversation", None))

    def decode(model: PreTrainedModel, input_ids: torch.Tensor, **prepared: Any) -> Any:
        # `generate` does not hand a streamer on to a callable; its readers expect the prompt first.
        if streamer is not None:
            streamer.put(input_ids.cpu())
        return custom_generate(model, input_ids, phrase_pool=pool, ouroboros_streamer=streamer, **prepared)

    try:
        # The class's method: the model's own attribute is this very function.
        method: Any = type(model).generate  # type: ignore[attr-defined]
        return method(model, **_with_stop_criteria(arguments), custom_generate=decode)
    finally:
        if not isinstance(pool, MemoryPool):
            _store().flush()


def _with_stop_criteria(arguments: dict[str, Any]) -> dict[str, Any]:
    """Stop strings as a criterion: like the streamer, the tokenizer that they need does not reach a callable."""
    config, tokenizer = arguments.get("generation_config"), arguments.get("tokenizer")
    stop_strings = arguments.get("stop_strings") or getattr(config, "stop_strings", None)
    if not stop_strings or tokenizer is None:
        return arguments
    if config is not None:
        config = copy.deepcopy(config)
        config.stop_strings = None
    criterion = StopStringCriteria(tokenizer, stop_strings)
    criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), criterion])
    return arguments | dict(generation_config=config, stop_strings=None, stopping_criteria=criteria)


def _pool(model: PreTrainedModel, conversation: Any) -> PhrasePool:
    """A conversation's own phrases, or none: requests share only what they asked for, because speed can be observed."""
    if conversation is None:
        return MemoryPool()
    scope = f"conversation:{check_scope(conversation, 'ouroboros_conversation')}"
    return open_pool(_store(), scope, _fingerprint(model.config._name_or_path))


@cache
def _store() -> PoolSource:
    """The process's store."""
    return open_source(default_store())


@cache
def _fingerprint(folder: str) -> str:
    return vocabulary_hash(AutoTokenizer.from_pretrained(folder))
