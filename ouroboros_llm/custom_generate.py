"""`model.generate(..., custom_generate=ouroboros_llm.custom_generate)`: our rounds inside the library's own call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from .decoding.decoder import Decoder
from .decoding.drafter import Round
from .decoding.sampling import Sampler
from .drafting.cached_answer import answer_source, index_answer
from .drafting.learned_state import LearnedState, sources
from .drafting.token_recycling import KEPT
from .drafting.tree_drafter import TreeDrafter
from .errors import OptionError
from .model_config import end_token_ids
from .options import DEFAULT_DRAFTERS
from .phrase_pool.base import PhrasePool
from .target_model.eager import vocabulary_size
from .target_model.prepared import PreparedModel, locked, prepare
from .transformers_api import PREPARED_ARGUMENTS, arguments_of_generate, filled_cache, generate_output

_UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def custom_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: GenerationConfig | None = None,
    phrase_pool: PhrasePool | None = None,
    ouroboros_streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """A decoding method for `model.generate`: the same tokens, several per pass where phrases are known.

    Call it as `model.generate(**inputs, custom_generate=custom_generate, phrase_pool=pool)`. Logits
    processors, stopping criteria, sampling and `torch.manual_seed` work as without it.

    Args:
        phrase_pool: where phrases are looked up, and where this output goes, with hashes of the prompt; None: the
            prompt and the output alone.
        ouroboros_streamer: what `streamer` is elsewhere; `generate` does not hand that one on to callables. It gets
            one round's tokens at a time.

    Returns:
        Token ids [1, length], prompt included, or a `GenerateDecoderOnlyOutput` of them if the configuration says so.

    Raises:
        OptionError: for what is not honored: batches, beams, several sequences, an assistant model, padding, scores.
    """
    config = generation_config or model.generation_config
    _check(model, config, input_ids, model_kwargs)
    prompt = input_ids[0].tolist()
    prepared = prepare(model)
    memory = LearnedState.recall(phrase_pool, prepared.fingerprint) if phrase_pool is not None else LearnedState()
    sampling, pools = bool(config.do_sample), [] if phrase_pool is None else [phrase_pool]
    answer = answer_source(pools, prepared.fingerprint, prompt, sampling=sampling)
    found = sources(DEFAULT_DRAFTERS, memory, answer=answer, write=phrase_pool, sampling=sampling)
    decoder = Decoder(prepared.start(), TreeDrafter(found, memory.calibration), successors=KEPT)
    sampler = Sampler(logits_processor or (), sample=sampling)
    rounds = decoder.rounds(
        prompt, sampler, limit=int(config.max_length or 0) - len(prompt), end_token_ids=end_token_ids(config)
    )
    output: list[int] = []
    for token_ids in _until_stopped(_locked(prepared, rounds), input_ids, stopping_criteria):
        output += token_ids
        if ouroboros_streamer is not None:
            ouroboros_streamer.put(torch.tensor(token_ids))
    if phrase_pool is not None:
        phrase_pool.add(output)
        index_answer(phrase_pool, prepared.fingerprint, prompt, output)
        memory.remember(phrase_pool, prepared.fingerprint)
    if ouroboros_streamer is not None:
        ouroboros_streamer.end()
    sequences: Any = torch.cat(
        [input_ids, torch.tensor([output], dtype=input_ids.dtype, device=input_ids.device)], dim=1
    )
    return generate_output(sequences) if config.return_dict_in_generate else sequences


def _locked(prepared: PreparedModel, rounds: Iterator[Round]) -> Iterator[Round]:
    while True:
        with locked(prepared):
            round = next(rounds, None)
        if round is None:
            return
        yield round


def _until_stopped(rounds: Iterator[Round], input_ids: torch.Tensor, criteria: Any) -> Iterator[list[int]]:
    """Each round's tokens, cut behind the first at which the criteria hold: they want to be asked after every token."""
    text = input_ids
    for round in rounds:
        taken: list[int] = []
        for token_id in round.token_ids:
            taken.append(token_id)
            text = torch.cat([text, text.new_tensor([[token_id]])], dim=1)
            if criteria and bool(torch.as_tensor(criteria(text, None)).all()):
                yield taken
                return
        yield taken


def _check(
    model: PreTrainedModel, config: GenerationConfig, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
) -> None:
    given = arguments_of_generate()
    mask, cache = model_kwargs.get("attention_mask"), filled_cache(model_kwargs)
    refused = {
        f"num_beams={config.num_beams}": (config.num_beams or 1) > 1,
        f"num_return_sequences={config.num_return_sequences}": (config.num_return_sequences or 1) > 1,
        f"a batch of {len(input_ids)}": len(input_ids) > 1,
        "an empty prompt": input_ids.shape[1] == 0,
        "token ids outside the vocabulary": bool((input_ids >= vocabulary_size(model)).any()),
        "padding in attention_mask": mask is not None and not bool(mask.all()),
        f"a filled {cache}": cache is not None,
        "assistant_model": given.get("assistant_model") is not None,
        "streamer (pass it as ouroboros_streamer)": given.get("streamer") is not None,
        f"prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}": bool(config.prompt_lookup_num_tokens),
        **{name: bool(getattr(config, name, None)) for name in _UNSUPPORTED_OUTPUTS},
        **{name: value is not None for name, value in model_kwargs.items() if name not in PREPARED_ARGUMENTS},
    }
    if wrong := [name for name, given in refused.items() if given]:
        names = ", ".join(wrong)
        raise OptionError(f"custom_generate decodes one sequence from its tokens alone; it does not honor {names}")
