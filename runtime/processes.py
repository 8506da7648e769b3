"""Work that several processes share: what torchrun or accelerate started, or this one alone."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from surgeon.runtime.parallel import is_sharded

_joinings = count()


@dataclass(frozen=True)
class Processes:
    """The processes that share some work, `count` of them, of which this is number `rank`.

    `group` is theirs in torch.distributed; None where there is but one.
    """

    rank: int = 0
    count: int = 1
    group: distributed.ProcessGroup | None = None

    def own(self, items: int) -> range:
        """Which of so many items this process is to do; every item is done by one."""
        return range(self.rank, items, self.count)

    def gather(
        self, rows: Mapping[int, Sequence[float]], items: int, width: int, device: torch.device
    ) -> list[list[float]]:
        """The rows of all items in their order, in every process, from what each found for its own items.

        A row is `width` numbers, which arrive to the bit. `device` is one whose tensors the group's backend takes.
        Every process must call this.
        """
        table = torch.zeros(items, width, dtype=torch.float64)
        for item, row in rows.items():
            table[item] = torch.tensor(row, dtype=torch.float64)
        if self.group is not None:
            table = table.to(device)
            distributed.all_reduce(table, group=self.group)  # all others have zeros there, so that sums are exact
        found: list[list[float]] = table.tolist()
        return found


def processes_of(model: torch.nn.Module) -> Processes:
    """Those that can share what a model reads: all, or this one alone where they share the model itself."""
    if not distributed.is_available() or not distributed.is_initialized() or is_sharded(model):
        return Processes()
    group = distributed.group.WORLD
    return Processes(distributed.get_rank(), distributed.get_world_size(), group)


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
    distributed.init_process_group(store=store, rank=rank, world_size=processes)
    try:
        yield local_rank
    finally:
        distributed.destroy_process_group()
