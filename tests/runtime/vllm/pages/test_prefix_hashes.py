"""Hashes of pages with rows that ask: equal where computing the page would give the same, and only there."""

from dataclasses import dataclass
from typing import Any

from surgeon.runtime.vllm.pages.prefix_hashes import Asking, marking, with_mark

PAGE = 64


@dataclass
class Request:
    num_prompt_tokens: int
    tokens: int


def plain_keys(_request: Request, start: int, _end: int, index: int) -> tuple[Any, int]:
    return (("cache_salt", "x"),) if start == 0 else None, index + 1


def hasher(request: Request) -> list[Any]:
    """Stands for vLLM's: the extra keys of each full page."""
    keys = with_mark(plain_keys)
    return [keys(request, start, start + PAGE, 7) for start in range(0, request.tokens - PAGE + 1, PAGE)]


def test_pages_with_rows_that_ask_say_where_these_begin() -> None:
    hashes = marking(hasher, Asking(100, 32))(Request(300, 330))
    assert hashes == [
        ((("cache_salt", "x"),), 8),
        (None, 8),
        (None, 8),
        ((("surgeon_asks_from", 192),), 8),
        ((("surgeon_asks_from", 192),), 8),
    ]


def test_a_short_prompt_asks_from_its_beginning() -> None:
    assert marking(hasher, Asking(100, 32))(Request(70, 70)) == [((("cache_salt", "x"), ("surgeon_asks_from", 0)), 8)]


def test_another_engine_has_vllms_own_hashes() -> None:
    marking(hasher, Asking(100, 32))(Request(300, 330))
    assert hasher(Request(300, 330))[-1] == (None, 8)
