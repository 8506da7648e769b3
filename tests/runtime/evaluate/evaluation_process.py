"""What each process of test_evaluation.py runs: evaluations that the processes share. Argument: a folder for them."""

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
"""Of sequences that two processes cannot share equally."""


def fails_at_3(item: int) -> int:
    if item == 3:
        raise ModelError("item 3", "no fault", f"one in process {os.environ['RANK']}", "try again")
    return item


def main(out: Path) -> None:
    dense, patched = tiny_llama(), tiny_llama(seed=5)
    sequences = [tokens(1, length, seed=length) for length in LENGTHS]
    found: dict[str, object] = {}
    with joined():  # as a tool under torchrun does
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
        sleep(0.5)  # the other one is there first, and must not find where this one was
    with joined():
        found["again"] = processes_of(dense).gather({shared.rank: (shared.rank + 1.0,)}, 2, 1)
    PartialState()  # as a script of accelerate's does
    with joined():
        found["perplexity by accelerate"] = perplexity(dense, sequences[:1])
    found["still there"] = distributed.is_initialized()
    torch.save(found, out / f"{os.environ['RANK']}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
