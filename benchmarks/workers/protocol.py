"""What a worker and the one who asks it say to each other: one JSON object a line. Needs no more than Python."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and how many tokens to continue it by, greedily and past any end of text."""

    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and the seconds until the first and the last of them: by the clock, and of all threads.

    CPU seconds count what waiting threads burn.
    """

    tokens: tuple[int, ...]
    first_s: float
    whole_s: float
    first_cpu_s: float
    whole_cpu_s: float


@dataclass(frozen=True)
class Ready:
    """A worker that has loaded its model: the versions of what it runs on, by name."""

    versions: Mapping[str, str]


@dataclass(frozen=True)
class Failed:
    """A worker that ends, and why."""

    reason: str


Message = Request | Answer | Ready | Failed
_KINDS: dict[str, Callable[..., Message]] = {kind.__name__.lower(): kind for kind in (Request, Answer, Ready, Failed)}


def line_of(message: Message) -> str:
    """The message as one line, with its end."""
    return json.dumps({"kind": type(message).__name__.lower(), **asdict(message)}) + "\n"


def message_of(line: str) -> Message:
    """The message of a line.

    Raises:
        ValueError: the line is no message.
    """
    fields: dict[str, Any] = json.loads(line)
    kind = _KINDS[fields.pop("kind")]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
