"""How results name dtypes."""

import torch


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in a row of results: `float32`, `bfloat16`, `float16`."""
    return str(dtype).removeprefix("torch.")
