"""A worker's process as the one who asks sees it."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

from surgeon.runtime.errors import ModelError
from workers.protocol import Answer, Failed, Message, Ready, Request, line_of, message_of

FOLDER = Path(__file__).parents[1]

Expected = TypeVar("Expected", Ready, Answer)


class Worker:
    """A process that loads `module` with these settings in another environment's Python, and then answers.

    As a context manager it ends the process. What the process prints goes to `log`.

    Raises:
        ModelError: it does not start, or does not load its model; the message says why.
    """

    def __init__(
        self, python: Path, module: str, settings: Mapping[str, object], log: Path, environment: Mapping[str, str]
    ) -> None:
        self._name, self._log = module, log
        command = [str(python), "-m", "workers.worker", module, json.dumps(settings)]
        path = os.pathsep.join(filter(None, (str(FOLDER), environment.get("PYTHONPATH"))))
        variables = os.environ | environment | {"PYTHONPATH": path}
        try:
            with log.open("w") as errors:
                self._process: subprocess.Popen[str] = subprocess.Popen(
                    command,
                    env=variables,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        except OSError as error:
            raise ModelError(str(python), "an interpreter", str(error), "make its environment first") from None
        try:
            self.versions = self._expect(Ready).versions
        except ModelError:
            self.close()
            raise

    def ask(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """Has a prompt continued.

        Raises:
            ModelError: the worker ended.
        """
        try:
            self._input.write(line_of(Request(tuple(prompt), new_tokens)))
            self._input.flush()
        except BrokenPipeError:
            pass  # its last words say why
        return self._expect(Answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _input(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _expect(self, kind: type[Expected]) -> Expected:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message: Message = message_of(line) if line else Failed(f"its process ended with {self._process.wait()}")
        if isinstance(message, kind):
            return message
        got = message.reason if isinstance(message, Failed) else type(message).__name__
        raise ModelError(self._name, f"its {kind.__name__.lower()}", got, f"read {self._log}")
