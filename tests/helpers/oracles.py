"""A tokenizer of single characters, and models that answer retrieval tasks from what they see, without any weights."""

import re
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that puts a special token before every text."""
    characters = sorted({*map(chr, range(32, 127)), "\n"})
    known = {"<s>": 0} | {character: index + 1 for index, character in enumerate(characters)}
    single = Tokenizer(WordLevel({**known, "?unknown": len(known)}, unk_token="?unknown"))
    single.pre_tokenizer = Split("", "isolated")
    single.decoder = Fuse()
    single.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=single, unk_token="?unknown", bos_token="<s>")


def filler(length: int) -> torch.Tensor:
    """Token ids `[1, length]` of a text that says nothing."""
    return torch.full((1, length), letters().convert_tokens_to_ids("x"))


class Oracle(torch.nn.Module):
    """Copies the number that a question about one number asks for from the last `sight` characters before it.

    What it does not find there it answers with zeros. Its cache is the list of the calls' tokens.
    """

    _QUESTIONS = (
        (r".*\? The pass key is(.*)", "The pass key is (\\d+)\\."),
        (r".*\? The special magic number for (\w+) is:(.*)", "The special magic number for {} is: (\\d+)\\."),
    )

    def __init__(self, sight: int) -> None:
        super().__init__()
        self.sight = sight
        self.calls: list[int] = []
        self._tokenizer = letters()
        self._inputs = torch.nn.Embedding(1, 1)
        self.generation_config = None

    def get_input_embeddings(self) -> torch.nn.Module:
        return self._inputs

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> CausalLMOutputWithPast:
        self.calls.append(input_ids.shape[1])
        seen = [*(past_key_values or []), *input_ids[0].tolist()]
        answer = self._next(str(self._tokenizer.decode(seen)))
        logits = torch.zeros(1, 1, len(self._tokenizer))
        logits[0, 0, self._tokenizer.convert_tokens_to_ids(answer)] = 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=seen)  # type: ignore[arg-type]

    def _next(self, text: str) -> str:
        """The character that goes on from a text."""
        for question, fact in self._QUESTIONS:
            if asked := re.fullmatch(question, text, re.DOTALL):
                *key, written = asked.groups()
                found = re.findall(fact.format(*key), text[: asked.start(len(key) + 1)][-self.sight :])
                return f" {found[0] if found else '00000'}. "[len(written)]
        return "y"
