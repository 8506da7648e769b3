"""What a module of this folder that wraps a library gives the worker."""

from collections.abc import Callable, Mapping
from typing import Protocol

OnToken = Callable[[int], None]


class Engine(Protocol):
    """A loaded model that continues one prompt at a time."""

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions of what it runs on, by name."""

    def generate(self, prompt: list[int], new_tokens: int, on_token: OnToken) -> None:
        """Continues a prompt greedily, past any end of text, and calls `on_token` with each token as it comes.

        Nothing of an earlier prompt may be used again.
        """
