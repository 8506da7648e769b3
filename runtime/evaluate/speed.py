"""Time to first token, decoding time and peak memory of several models, measured in turn on the same sequences."""

import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from surgeon.runtime.transformers.cache import CACHE_NAME
from surgeon.runtime.transformers.offload import entry_device


@dataclass(frozen=True)
class Speed:
    """Seconds to the first token and per decoded token in each round, and peak memory in bytes, if known."""

    first_token: tuple[float, ...]
    decoded_token: tuple[float, ...]
    peak_bytes: int | None


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    sequences: Sequence[torch.Tensor],
    steps: int,
    rounds: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Speed]:
    """Times every model on reading all but the last `steps` tokens of `[1, length]`, then on taking those one by one.

    A round is one call of each model on the round's sequence; the order rotates by one each round, since a call pays
    for what the one before it evicted from the caches. Untimed calls go first; memory is measured on them. The tokens
    are the text's own, so that all models do the same work.
    """
    peaks = {}
    for name, model in models.items():
        peaks[name] = _peak_bytes(model, lambda model=model: _read(model, sequences[0], steps))  # type: ignore[misc]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    order = list(models)
    for done in range(rounds):
        if progress:
            progress("speed", done, rounds)
        for name in order:
            times[name].append(_read(models[name], sequences[done % len(sequences)], steps))
        order.append(order.pop(0))
    return {
        name: Speed(tuple(first for first, _ in found), tuple(each for _, each in found), peaks[name])
        for name, found in times.items()
    }


@torch.inference_mode()
def _read(model: PreTrainedModel, sequence: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds to the first token, and per decoded token."""
    device = entry_device(model)
    tokens = sequence.to(device)
    prompt = tokens.shape[1] - steps
    started = _now(device)
    output = model(input_ids=tokens[:, :prompt], use_cache=True, logits_to_keep=1)
    cache = {CACHE_NAME: output[CACHE_NAME]}
    first = _now(device)
    for position in range(prompt, prompt + steps):
        model(input_ids=tokens[:, position : position + 1], **cache, use_cache=True)
    return first - started, (_now(device) - first) / steps


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_bytes(model: PreTrainedModel, call: Callable[[], object]) -> int | None:
    """Peak memory in use during a call: torch's on the model's GPUs, else the process's resident memory."""
    devices = {entry_device(model), *(parameter.device for parameter in model.parameters())}
    if gpus := [device for device in devices if device.type == "cuda"]:
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        call()
        return sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # else memory that the previous model freed would count for this one
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    except OSError:
        call()
        return None
    call()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
