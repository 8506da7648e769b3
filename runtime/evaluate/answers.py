"""Answers of a model to the questions of a prompt, by greedy decoding with a cache."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgeon.runtime.evaluate.tasks.prompts import Prompt, Question
from surgeon.runtime.transformers.offload import entry_device


@torch.inference_mode()
def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[float, ...]:
    """The score, 0 to 1, of each of the prompt's questions.

    A question at the end is read in one call with the text. For later ones the text is read first, in one call, and
    each question in a second one that goes on from a copy of its cache. Answers are decoded one token at a time.
    """
    device = entry_device(model)
    text = prompt.text[None].to(device)
    if prompt.at_end:
        (question,) = prompt.questions
        return (_score(model, tokenizer, question, torch.cat([text, question.tokens[None].to(device)], dim=1), None),)
    read = model(input_ids=text, use_cache=True, logits_to_keep=1).past_key_values
    return tuple(score_later(model, tokenizer, question, read) for question in prompt.questions)


@torch.inference_mode()
def score_later(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question, read: Any, by_token: bool = False
) -> float:
    """The score, 0 to 1, of a later turn about a text, given the cache that has read it, which is copied.

    With `by_token` the question is read one token at a time, so that every row of it is a decoding step.
    """
    cache = copy.deepcopy(read)  # caches of some layers cannot be cropped back
    ids = question.tokens[None].to(entry_device(model))
    if by_token:
        *before, ids = (ids[:, [place]] for place in range(ids.shape[1]))
        for token in before:
            cache = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return _score(model, tokenizer, question, ids, cache)


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question, ids: torch.Tensor, cache: Any
) -> float:
    stops = getattr(model.generation_config, "eos_token_id", None)
    ends = {stops} if isinstance(stops, int) else set(stops or ())
    written: list[int] = []
    answer = ""
    while len(written) < question.budget and not question.query.is_scored(answer):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
        if int(ids) in ends:
            break
        written.append(int(ids))
        answer = str(tokenizer.decode(written))
    return question.query.score(answer)
