"""Expanded block schedules, to check against the definition."""

import numpy as np
import numpy.typing as npt

from surgeon.runtime.package.schedule import HeadSchedule


def block_mask(head: HeadSchedule, num_blocks: int) -> npt.NDArray[np.bool_]:
    """The blocks that a kernel reads by the schedule, bool `[num_blocks, num_blocks]`."""
    mask = np.zeros((num_blocks, num_blocks), dtype=np.bool_)
    for row in range(num_blocks):
        for run in head.row(row):
            mask[row, run.begin : run.end] = True
    return mask
