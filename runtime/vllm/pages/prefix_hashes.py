"""Hashes of vLLM's prefix cache that tell pages computed under the pattern from those with rows that ask.

Under recall "dense" the last rows of a prompt, and all after it, read everything, so a page's values depend on where
its prompt ended. A page with such rows has their beginning in its hash: it is hit only by a request whose rows that ask
begin there too, and a hit gives what computing the page would give.

Source: `vllm.v1.core.kv_cache_utils`, generate_block_hash_extra_keys.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Asking:
    """The rows that ask in a server's requests: the tokens at a prompt's end, and the package's block in tokens."""

    tokens: int
    block_size: int

    def first_token(self, prompt_tokens: int) -> int:
        """The first token of a prompt, of so many tokens, that reads everything."""
        return max(0, prompt_tokens - self.tokens) // self.block_size * self.block_size


_HASHING: ContextVar[Asking | None] = ContextVar("surgeon_hashing", default=None)

Hasher = Callable[[Any], list[Any]]


def marking(hasher: Hasher, asking: Asking) -> Hasher:
    """The hasher of an engine's requests, whose hashes tell where rows that ask begin."""

    def hashes(request: Any) -> list[Any]:
        before = _HASHING.set(asking)
        try:
            return hasher(request)
        finally:
            _HASHING.reset(before)

    return hashes


def with_mark(extra_keys: Callable[..., tuple[Any, int]]) -> Callable[..., tuple[Any, int]]:
    """vLLM's `generate_block_hash_extra_keys`, with one key more for pages with rows that ask."""

    def keys(request: Any, start: int, end: int, *rest: Any) -> tuple[Any, int]:
        found, after = extra_keys(request, start, end, *rest)
        asking = _HASHING.get()
        if asking is not None and end > (first := asking.first_token(request.num_prompt_tokens)):
            found = (*(found or ()), ("surgeon_asks_from", first))
        return found, after

    return keys
