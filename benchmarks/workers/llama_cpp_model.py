"""llama.cpp on a GGUF file, through llama-cpp-python."""

import itertools
from collections.abc import Mapping

import llama_cpp

from workers.engine import OnToken


class LlamaCppModel:
    """A context of llama.cpp."""

    def __init__(self, gguf: str, threads: int, longest: int) -> None:
        self._llama = llama_cpp.Llama(
            gguf, n_ctx=longest, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
        )
        self.versions: Mapping[str, str] = {"llama-cpp-python": llama_cpp.__version__}

    def generate(self, prompt: list[int], new_tokens: int, on_token: OnToken) -> None:
        """Continues a prompt."""
        self._llama.reset()  # else what it shares with the prompt before is used again
        for token in itertools.islice(self._llama.generate(prompt, temp=0.0), new_tokens):
            on_token(int(token))


def load(gguf: str, threads: int, longest: int) -> LlamaCppModel:
    """Reads a GGUF file, for prompts and answers of at most `longest` tokens together."""
    return LlamaCppModel(gguf, threads, longest)
