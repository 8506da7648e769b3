"""The script of test_comparison.py's processes: evaluations that they share. Argument: a folder for the results."""

import os
import sys
from pathlib import Path
from time import sleep

import torch
from accelerate import PartialState
from torch import distributed

from models import tiny_llama, tokens
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.comparison import compare, perplexity
from surgeon.runtime.evaluate.processes import joined, processes_of

LENGTHS = (60, 45, 70)
"""Lengths of sequences that two processes cannot share equally."""


def fails_at_3(item: int) -> int:
    if item == 3:
        raise ModelError("item 3", "no fault", f"one in process {os.environ['RANK']}", "try again")
    return item


def main(out: Path) -> None:
    dense, patched = tiny_llama(), tiny_llama(seed=5)
    sequences = [tokens(1, length, seed=length) for length in LENGTHS]
    found: dict[str, object] = {}
    with joined():  # as tools do under torchrun
        shared = processes_of(dense)
        found["own"] = shared.own(len(sequences))
        found["comparison"] = compare(dense, patched, sequences)
        found["perplexity"] = perplexity(dense, sequences)
        third = {index: (1 / 3 + index, -(10.0**-300)) for index in shared.own(5)}
        found["rows"] = shared.gather(third, 5, 2)
        found["totals"] = shared.totals((shared.rank + 1.0, 0.5))
        made = shared.share(5, lambda item: {"item": torch.tensor(item), "by": shared.rank})
        found["shared"] = [(int(each["item"]), each["by"]) for each in made]
        found["first"] = shared.first(lambda: shared.rank)
        taken = []
        try:
            for each in shared.share(4, fails_at_3):
                taken.append(each)
        except ModelError as error:
            found["failed"] = (taken, str(error))
    found["left"] = not distributed.is_initialized()
    if shared.rank:
        sleep(0.5)  # the other is there first, and must not find this one's old address
    with joined():
        found["again"] = processes_of(dense).gather({shared.rank: (shared.rank + 1.0,)}, 2, 1)
    PartialState()  # as accelerate's scripts do
    with joined():
        found["perplexity by accelerate"] = perplexity(dense, sequences[:1])
    found["still there"] = distributed.is_initialized()
    torch.save(found, out / f"{os.environ['RANK']}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
