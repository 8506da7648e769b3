"""The lengths of the prompts in a step's batch, which vLLM's runner knows and its metadata does not carry.

Source: `vllm.v1.worker.gpu_model_runner`, GPUModelRunner._build_attention_metadata.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

_LENGTHS: ContextVar[torch.Tensor | None] = ContextVar("surgeon_prompt_lengths", default=None)


def prompt_lengths(sequences: int) -> torch.Tensor | None:
    """The tokens of each prompt of the batch whose metadata is being built; None if no runner has said."""
    lengths = _LENGTHS.get()
    return None if lengths is None else lengths[:sequences]


def noting_prompts(build: Callable[..., Any]) -> Callable[..., Any]:
    """A runner's `_build_attention_metadata` that tells the builders which prompts its batch has."""

    def build_and_note(runner: Any, *arguments: Any, **options: Any) -> Any:
        before = _LENGTHS.set(runner.input_batch.num_prompt_tokens_cpu_tensor)
        try:
            return build(runner, *arguments, **options)
        finally:
            _LENGTHS.reset(before)

    return build_and_note
