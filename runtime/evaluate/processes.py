"""Work that several processes share: what torchrun or accelerate started, or this one alone."""

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
_PATIENCE = timedelta(days=1)  # as long as another's work may take; that it has ended is noticed at once


@dataclass(frozen=True)
class Processes:
    """The processes that share some work, `count` of them, of which this is number `rank`.

    `group` is theirs in torch.distributed, None where there is but one, and `device` is one whose tensors it takes.
    What one hands to the others is called by all of them, in the same order.
    """

    rank: int = 0
    count: int = 1
    group: distributed.ProcessGroup | None = None
    device: torch.device = _CPU

    def own(self, items: int) -> range:
        """Which of so many items this process is to do; every item is done by one."""
        return range(self.rank, items, self.count)

    def gather(self, rows: Mapping[int, Sequence[float]], items: int, width: int) -> list[list[float]]:
        """The rows of all items in their order, in every process, from what each found for its own items.

        A row is `width` numbers, which arrive to the bit.
        """
        table = torch.zeros(items, width, dtype=torch.float64, device="cpu")
        for item, row in rows.items():
            table[item] = torch.tensor(row, dtype=torch.float64, device="cpu")
        if self.group is not None:
            table = table.to(self.device)
            distributed.all_reduce(table, group=self.group)  # all others have zeros there, so that sums are exact
        found: list[list[float]] = table.tolist()
        return found

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """The sums of every process's numbers, in every process."""
        rows = self.gather({self.rank: numbers}, self.count, len(numbers))
        return [math.fsum(column) for column in zip(*rows, strict=True)]

    def share(self, items: int, make: Callable[[int], Made]) -> Iterator[Made]:
        """Yields what `make` finds for each item, in order and in every process; each process makes its own items.

        As many are made at a time as there are processes, and what is found is pickled on its way. An error of
        Surgeon's or of the system in one process is raised in all. Every process must take all.
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
                yield found  # type: ignore[misc]  # the owner's, who had an item

    def first(self, make: Callable[[], Made]) -> Made:
        """Returns what the first process makes, in every process; the others wait. Otherwise as `share`."""
        return next(self.share(1, lambda _: make()))


def all_processes() -> Processes:
    """All that torch.distributed knows of; where it knows of none, this one."""
    if not distributed.is_available() or not distributed.is_initialized():
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size(), distributed.group.WORLD)


def processes_of(model: PreTrainedModel) -> Processes:
    """Finds the processes that can share what a model reads: all, or this one where they share the model itself."""
    return Processes() if is_sharded(model) else replace(all_processes(), device=entry_device(model))


@contextmanager
def joined() -> Iterator[int]:
    """Joins the processes that torchrun or accelerate started, if any, and gives this one's number on its machine.

    The backend is gloo on CPUs and NCCL on GPUs, each process on a GPU of its own. A group that there is already is
    used and left alone. One process may join again and again, if all do.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone or distributed.is_initialized():
        yield local_rank
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    # The processes exchange addresses in a store that outlives the group. Where a second group looks in the same place,
    # it may find addresses of the first and wait for ever.
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
