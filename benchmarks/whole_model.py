"""SmolLM2-135M-Instruct, patched and not: time to first token, decoding speed, and the worst case at short lengths."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from measure import interleaved, repeats_for, seconds_of
from smollm2 import load_model, model_folder
from surgeon.compiler import compile_package, read_topology
from surgeon.compiler.cache import cache_folder
from surgeon.runtime import Package, load, patch

TOPOLOGIES = Path(__file__).parent / "topologies"
LEARNED = {2048: "smollm2-135m-25", 4096: "smollm2-135m-25-4096", 8192: "smollm2-135m-25-8192"}


def time_to_first_token(variant: str | None) -> Iterator[dict[str, object]]:
    """A prefill with the cache filled and the last token's logits, each length with the topology learned for it."""
    for length, name in LEARNED.items():
        dense, patched, package = _models(name, variant)
        yield _prefill_row(dense, patched, length) | {"topology": name, "variant": package.cpu_variant}


def short_prompts(variant: str | None) -> Iterator[dict[str, object]]:
    """Where there is little to gain: prompts of 64 to 2,048 tokens."""
    dense, patched, _ = _models("smollm2-135m-25", variant)
    for length in (64, 128, 256, 512, 1024, 2048):
        yield _prefill_row(dense, patched, length)


def decoding(variant: str | None) -> Iterator[dict[str, object]]:
    """Tokens a second with a filled dynamic cache, one token a step."""
    for length, name in LEARNED.items():
        dense, patched, _ = _models(name, variant)
        steps = 8
        calls = {"dense": _decoder(dense, length, steps), "patched": _decoder(patched, length, steps)}
        times = interleaved(calls, 5)
        yield {
            "length": length,
            "dense_tokens_s": steps / times["dense"].median,
            "patched_tokens_s": steps / times["patched"].median,
            "times": times["dense"].median / times["patched"].median,
        }


def _models(name: str, variant: str | None) -> tuple[PreTrainedModel, PreTrainedModel, Package]:
    """Two models over the same files, each with a config of its own, one of them patched."""
    folder = model_folder(cache_folder())
    dense, patched = load_model(folder), load_model(folder)
    out = compile_package(read_topology(TOPOLOGIES / f"{name}.json"), cache_folder() / "kernels" / name)
    package = load(out, strict=True, cpu_variant=variant)
    patch(patched, package)
    return dense, patched, package


def _prefill_row(dense: PreTrainedModel, patched: PreTrainedModel, length: int) -> dict[str, object]:
    tokens = torch.randint(1000, 40000, (1, length), generator=torch.Generator().manual_seed(0))

    def prefill(model: PreTrainedModel) -> Callable[[], object]:
        @torch.inference_mode()
        def run() -> object:
            return model(input_ids=tokens, logits_to_keep=1)

        return run

    calls = {"dense": prefill(dense), "patched": prefill(patched)}
    repeats = repeats_for(sum(seconds_of(call) for call in calls.values()), budget=15.0, least=3, most=15)
    times = interleaved(calls, repeats)
    return {
        "length": length,
        "dense_s": times["dense"].median,
        "patched_s": times["patched"].median,
        "times": times["dense"].median / times["patched"].median,
        "times_minimum": times["dense"].minimum / times["patched"].minimum,
        "times_cpu": times["dense"].cpu / times["patched"].cpu,
    }


def _decoder(model: PreTrainedModel, length: int, steps: int) -> Callable[[], object]:
    """Takes `steps` tokens in turn behind a cache of `length`, which is cut back afterwards."""
    tokens = torch.randint(1000, 40000, (1, length + steps), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache: Any = model(input_ids=tokens[:, :length], logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def run() -> None:
        for step in range(length, length + steps):
            model(input_ids=tokens[:, step : step + 1], past_key_values=cache)
        cache.crop(-steps)

    return run
