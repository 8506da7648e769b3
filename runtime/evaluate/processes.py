"""Processes that share some work: those that torchrun or accelerate started, or this one alone."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous
from transformers import PreTrainedModel

from surgeon.runtime.errors import SurgeonError
from surgeon.runtime.transformers.offload import entry_device
from surgeon.runtime.transformers.tensor_parallel import is_sharded

Made = TypeVar("Made")

_CPU = torch.device("cpu")
_joinings = count()
_PATIENCE = timedelta(days=1)  # the longest that another's work may take; its end is noticed at once


@dataclass(frozen=True)
class Processes:
    """The `count` processes that share some work; this one is number `rank`.

    `group` is theirs in torch.distributed, None if there is only one process; it takes tensors on `device`. Every
    method that exchanges data must be called by all processes, in the same order.
    """

    rank: int = 0
    count: int = 1
    group: distributed.ProcessGroup | None = None
    device: torch.device = _CPU

    def own(self, items: int) -> range:
        """The items, out of this many, that this process is to do; each item belongs to one process."""
        return range(self.rank, items, self.count)

    def gather(self, rows: Mapping[int, Sequence[float]], items: int, width: int) -> list[list[float]]:
        """Gathers the rows of all items, in order, in every process, from the rows of each process's own items.

        A row is `width` numbers, which arrive bit for bit.
        """
        table = torch.zeros(items, width, dtype=torch.float64, device="cpu")
        for item, row in rows.items():
            table[item] = torch.tensor(row, dtype=torch.float64, device="cpu")
        if self.group is not None:
            table = table.to(self.device)
            distributed.all_reduce(table, group=self.group)  # all others have zeros there, so the sums are exact
        found: list[list[float]] = table.tolist()
        return found

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Sums the numbers over the processes, place by place, in every process."""
        rows = self.gather({self.rank: numbers}, self.count, len(numbers))
        return [math.fsum(column) for column in zip(*rows, strict=True)]

    def share(self, items: int, make: Callable[[int], Made]) -> Iterator[Made]:
        """Yields the result of `make` for each item, in order and in every process; each process makes its own items.

        As many items are made at a time as there are processes, and results travel pickled. A SurgeonError or an
        OSError in one process is raised in all. Every process must consume all results.
        """
        for begin in range(0, items, self.count):
            own = _attempted(make, begin + self.rank) if begin + self.rank < items else None
            for owner in range(min(self.count, items - begin)):
                box: list[Made | Exception | None] = [own]
                if self.group is not None:
                    distributed.broadcast_object_list(box, owner, self.group, self.device)
                found = box[0]
                if isinstance(found, Exception):
                    raise found
                yield found  # type: ignore[misc]  # from its owner, which had an item

    def first(self, make: Callable[[], Made]) -> Made:
        """Returns in every process what the main process makes, while the others wait; otherwise like `share`."""
        return next(self.share(1, lambda _: make()))


def all_processes() -> Processes:
    """All processes that torch.distributed knows of, or this one alone if it knows of none."""
    if not distributed.is_available() or not distributed.is_initialized():
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size(), distributed.group.WORLD)


def processes_of(model: PreTrainedModel) -> Processes:
    """The processes that can share a model's input: all, or this one alone where they share the model itself."""
    return Processes() if is_sharded(model) else replace(all_processes(), device=entry_device(model))


@contextmanager
def joined() -> Iterator[int]:
    """Joins the processes that torchrun or accelerate started, if any, and yields this one's number on its machine.

    The backend is gloo on CPUs and NCCL on GPUs, with a GPU for each process. A group that exists already is used and
    left alone. A process may join repeatedly, if all do.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone or distributed.is_initialized():
        yield local_rank
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    # The processes exchange addresses in a store that outlives the group. A second group that looks in the same place
    # may find addresses of the first and wait forever.
    store, rank, processes = next(rendezvous("env://"))
    store = distributed.PrefixStore(f"surgeon/{next(_joinings)}", store)  # type: ignore[attr-defined]  # public, unlisted
    distributed.init_process_group(store=store, rank=rank, world_size=processes, timeout=_PATIENCE)
    try:
        yield local_rank
    finally:
        distributed.destroy_process_group()


def _attempted(make: Callable[[int], Made], item: int) -> Made | Exception:
    try:
        return make(item)
    except (SurgeonError, OSError) as error:
        return error
