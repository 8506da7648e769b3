"""A store for the results of a long run's steps, each computed once, so that an interrupted run continues."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from surgeon.compiler.system.atomic_files import write_file
from surgeon.runtime.errors import ModelError, reason_of

Tensors = dict[str, torch.Tensor]


class CheckpointStore:
    """Keeps the results of steps in a folder, keyed by what each depends on; without a folder, in memory.

    A result is written to a temporary file and renamed into place, so an interrupted step leaves nothing. `computed`
    and `found` count the steps that this run computed and found; `found_seconds` is the CPU time that the found ones
    took when they were computed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._seen: set[Path] = set()
        self._memory: dict[str, Tensors] = {}
        self.computed = self.found = 0
        self.found_seconds = 0.0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def once(self, step: Mapping[str, object], compute: Callable[[], Tensors]) -> Tensors:
        """Returns the result of a step, found or else computed and kept; raises as `find` does."""
        kept = self.find(step)
        if kept is not None:
            return kept
        started = time.process_time()
        return self.keep(step, compute(), time.process_time() - started)

    def find(self, step: Mapping[str, object]) -> Tensors | None:
        """Returns the result of a step that has been done before, else None.

        `step` states everything that the result depends on, as JSON values; any difference makes it another step.

        Raises:
            ModelError: a kept result is damaged.
        """
        if self._folder is None:
            return self._memory.get(_spelled(step))
        file = self._folder / _file_name(step)
        if not file.exists():
            return None
        tensors, seconds = self._read(file)
        if file not in self._seen:
            self.found += 1
            self.found_seconds += seconds
        self._seen.add(file)
        return tensors

    def keep(self, step: Mapping[str, object], result: Tensors, cpu_seconds: float) -> Tensors:
        """Keeps the result of a step, with the CPU time that it took, and returns it."""
        self.computed += 1
        if self._folder is None:
            self._memory[_spelled(step)] = result
            return result
        tensors = {name: tensor.contiguous() for name, tensor in result.items()}
        about = {"step": _spelled(step), "cpu_seconds": str(cpu_seconds)}
        file = self._folder / _file_name(step)
        self._seen.add(file)
        write_file(file, safetensors.torch.save(tensors, about))
        return tensors

    def _read(self, file: Path) -> tuple[Tensors, float]:
        try:
            if not file.is_file():  # a pipe would be waited for
                raise OSError("not a file")
            with safetensors.safe_open(file, "pt") as kept:
                seconds = float(kept.metadata()["cpu_seconds"])
                return {name: kept.get_tensor(name) for name in sorted(kept.keys())}, seconds
        except Exception as error:  # whatever the library says of a damaged file
            raise ModelError(
                str(file), "the result of an earlier step", reason_of(error), f"delete {self._folder} and start again"
            ) from None


def _spelled(step: Mapping[str, object]) -> str:
    return json.dumps(step, sort_keys=True)


def _file_name(step: Mapping[str, object]) -> str:
    return f"{hashlib.sha256(_spelled(step).encode()).hexdigest()[:32]}.safetensors"
