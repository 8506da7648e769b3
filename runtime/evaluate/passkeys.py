"""Passkey retrieval: a made-up number is hidden in filler text and asked for at the end, by depth and length.

The score is exact match under greedy decoding: prompt and number are read at once, and every token of the number must
be ranked first, which is when greedy decoding would write it. For a base model that never gets a whole number right,
the log-probability still shows how much of it was found.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgeon.runtime.errors import ModelError
from surgeon.runtime.transformers.offload import entry_device

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NUMBERS = range(10_000, 100_000)
_QUESTION = "\n\nThe secret number is"


@dataclass(frozen=True)
class Passkey:
    """A prompt and the number it asks for, as token ids of one dimension; prompt and answer make `length` tokens."""

    length: int
    depth: float
    prompt: torch.Tensor
    answer: torch.Tensor


@dataclass(frozen=True)
class Retrieval:
    """The answer to a task: `found` if greedy decoding would write the number; log-probability in nats per token."""

    found: bool
    log_probability: float


def passkeys(
    tokenizer: PreTrainedTokenizerBase,
    fillers: Sequence[torch.Tensor],
    lengths: Sequence[int],
    trials: int,
    seed: int = 0,
) -> tuple[Passkey, ...]:
    """Makes `trials` tasks for each length and depth, none for a length too short for number and question.

    Fillers are token ids `[1, tokens]` of text, taken in turn, each as long as the greatest length.

    Raises:
        ModelError: the tokenizer has no tokens for a number.
    """
    drawn = random.Random(seed)
    start = _start(tokenizer)
    tasks: list[Passkey] = []
    for length in lengths:
        for depth in DEPTHS:
            for _ in range(trials):
                number = drawn.choice(_NUMBERS)
                hidden = _ids(tokenizer, f"\n\nThe secret number is {number}. Remember it: {number}.\n\n")
                question, answer = _question_and_answer(tokenizer, number)
                room = length - len(start) - len(hidden) - len(question) - len(answer)
                if room < 0:
                    continue
                filler = fillers[len(tasks) % len(fillers)][0, :room].tolist()
                before = round(depth * room)
                prompt = [*start, *filler[:before], *hidden, *filler[before:], *question]
                tasks.append(
                    Passkey(length, depth, torch.tensor(prompt, device="cpu"), torch.tensor(answer, device="cpu"))
                )
    return tuple(tasks)


@torch.inference_mode()
def retrieve(model: PreTrainedModel, task: Passkey) -> Retrieval:
    """Asks a model for one number."""
    count = len(task.answer)
    device = entry_device(model)
    ids, answer = torch.cat([task.prompt, task.answer])[None].to(device), task.answer.to(device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[0, -count - 1 : -1].float()
    right = torch.log_softmax(logits, dim=-1).gather(1, answer[:, None])
    return Retrieval(bool((logits.argmax(dim=-1) == answer).all()), float(right.double().mean()))


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text: a beginning-of-text token, or none."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def _question_and_answer(tokenizer: PreTrainedTokenizerBase, number: int) -> tuple[list[int], list[int]]:
    """Token ids of the question and of the answer; a token that spans both belongs to the answer."""
    alone, whole = _ids(tokenizer, _QUESTION), _ids(tokenizer, f"{_QUESTION} {number}")
    common = next((i for i, (one, other) in enumerate(zip(alone, whole, strict=False)) if one != other), len(alone))
    if not whole[common:]:
        raise ModelError(
            type(tokenizer).__name__, "tokens for a number", "none", "use the model's own tokenizer, or --passkeys 0"
        )
    return whole[:common], whole[common:]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
