"""SmolLM2-135M-Instruct, patched and dense: time to first token, decoding speed, and the worst case, short prompts."""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from inputs.checkpoints import SMOLLM2_135M, load_model, model_folder
from measure.dtypes import name_of
from measure.peak_memory import peak_bytes
from measure.timing import interleaved, repeats_for, seconds_of
from surgeon.compiler import compile_package, read_topology
from surgeon.compiler.system.cache import cache_folder
from surgeon.runtime import Package, SurgeonCache, load, patch, trace
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.pilot.run import twin
from surgeon.runtime.transformers.cache import CACHE_NAME

TOPOLOGIES = Path(__file__).parents[1] / "topologies"
FOR_ANSWERS = (
    (2048, "smollm2-135m-10-answers"),
    (2048, "smollm2-135m-25-answers"),
    (4096, "smollm2-135m-24-answers-4096"),
    (8192, "smollm2-135m-23-answers-8192"),
    (8192, "smollm2-135m-9-answers-8192"),
)
QUARTERS = FOR_ANSWERS[1], FOR_ANSWERS[3]
LEARNED = {2048: "smollm2-135m-25", 4096: "smollm2-135m-22-4096", 8192: "smollm2-135m-21-8192"}


def time_to_first_token(variant: str | None) -> Iterator[dict[str, object]]:
    """A prefill that fills the cache and computes the last token's logits, with topologies for each length.

    The patched model has recall "dense"; beside it stands the one that follows the pattern alone.
    """
    for length, name in FOR_ANSWERS:
        dense, patched, package = _models(name, variant, "dense")
        alone = twin(dense)
        patch(alone, package, recall="pattern")
        row = _prefill_row(dense, patched, length, alone=alone)
        yield row | {"topology": name, "variant": package.cpu_variant}


def ways_to_run(variant: str | None) -> Iterator[dict[str, object]]:
    """The first token in bf16 of the dense and the patched model: eager, compiled as one graph, and traced.

    A traced model keeps no cache and computes the logits of all tokens. Compiling is timed with a first, short prompt.
    """
    for length, name in QUARTERS:
        dense, patched, package = _models(name, variant, "dense", torch.bfloat16)
        traced = trace(dense, package, recall="dense")
        compiled: dict[str, Callable[..., Any]] = {
            "dense_compiled": torch.compile(dense, dynamic=True, fullgraph=True),
            "patched_compiled": torch.compile(patched, dynamic=True, fullgraph=True),
        }
        row: dict[str, object] = {"length": length, "topology": name, "variant": package.cpu_variant}
        for way, model in compiled.items():
            started = time.perf_counter()
            reader(model, length // 2)()
            row[f"{way}_compile_s"] = time.perf_counter() - started
        models: dict[str, Callable[..., Any]] = {"dense": dense, "patched": patched, **compiled}
        calls = {way: reader(model, length) for way, model in models.items()}
        calls["traced"] = torch.inference_mode()(partial(traced, _prompt(length)))
        repeats = repeats_for(sum(seconds_of(call) for call in calls.values()), budget=60.0, least=3, most=15)
        for way, timing in interleaved(calls, repeats).items():
            row |= {f"{way}_s": timing.median, f"{way}_min_s": timing.minimum, f"{way}_cpu_s": timing.cpu}
        yield row


def short_prompts(variant: str | None) -> Iterator[dict[str, object]]:
    """Prompts of 64 to 2,048 tokens, where there is little to gain.

    There are many calls, since the differences are a few hundredths, and single calls of a third of a second vary by
    more.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dense, patched, _ = _models("smollm2-135m-25", variant, dtype=dtype)
        for length in (64, 128, 256, 512, 1024, 2048):
            row = _prefill_row(dense, patched, length, budget=45.0, most=60)
            yield {"dtype": name_of(dtype), **row}


def decoding(variant: str | None) -> Iterator[dict[str, object]]:
    """Tokens per second with a filled dynamic cache, one token per step."""
    steps = 8
    for dtype, (length, name) in itertools.product((torch.float32, torch.bfloat16), LEARNED.items()):
        dense, patched, _ = _models(name, variant, dtype=dtype)
        calls = {"dense": decoder(dense, length, steps), "patched": decoder(patched, length, steps)}
        times = interleaved(calls, 5)
        yield {
            "dtype": name_of(dtype),
            "length": length,
            "dense_tokens_s": steps / times["dense"].median,
            "patched_tokens_s": steps / times["patched"].median,
            "times": times["dense"].median / times["patched"].median,
        }


def caching(variant: str | None, length: int = 8192, steps: int = 8) -> Iterator[dict[str, object]]:
    """Decoding with a DynamicCache and with one that drops what no head reads: speed, bytes kept, peak memory.

    The peak is that of a separate process that reads the prompt and then decodes, beyond what it held before.
    """
    name = LEARNED[max(known for known in LEARNED if known <= max(length, min(LEARNED)))]
    dense, patched, package = _models(name, variant)
    cache = SurgeonCache(package)
    calls = {
        "dense": decoder(dense, length, steps),
        "patched": decoder(patched, length, steps),
        "surgeon_cache": decoder(patched, length, steps, cache),
    }
    _check_equal(patched, package, length)
    times = interleaved(calls, 5)
    row: dict[str, object] = {
        "length": length,
        "topology": name,
        "variant": package.cpu_variant,
        "full_cache_mb": cache.full_bytes() / 1e6,
        "kept_cache_mb": cache.kept_bytes() / 1e6,
    }
    for key, timing in times.items():
        row[f"{key}_tokens_s"] = steps / timing.median
    for key in times:
        row[f"{key}_peak_mb"] = peak_bytes(key, name, length, steps, variant) / 1e6
    yield row


def _check_equal(patched: PreTrainedModel, package: Package, length: int) -> None:
    """Checks that both caches give the patched model the same logits for the next tokens."""
    tokens = torch.randint(1000, 40000, (1, min(length, 512) + 1), generator=torch.Generator().manual_seed(0))
    found = []
    for cache in (DynamicCache(config=patched.config), SurgeonCache(package)):
        with torch.inference_mode():
            patched(input_ids=tokens[:, :-1], **{CACHE_NAME: cache})
            found.append(patched(input_ids=tokens[:, -1:], **{CACHE_NAME: cache}).logits)
    if not torch.equal(*found):
        raise ModelError("model-cache", "the same logits with both caches", "others", "report this as a fault")


def _models(
    name: str, variant: str | None, recall: str = "pattern", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedModel, Package]:
    """Two models over the same files, each with a config of its own, one of them patched."""
    folder = model_folder(SMOLLM2_135M, cache_folder())
    dense, patched = load_model(folder, dtype), load_model(folder, dtype)
    out = compile_package(read_topology(TOPOLOGIES / f"{name}.json"), cache_folder() / "kernels" / name)
    package = load(out, strict=True, cpu_variant=variant)
    patch(patched, package, recall=recall)
    return dense, patched, package


def _prefill_row(
    dense: PreTrainedModel,
    patched: PreTrainedModel,
    length: int,
    budget: float = 15.0,
    most: int = 15,
    alone: PreTrainedModel | None = None,
) -> dict[str, object]:
    """Times both models on random tokens, and a third one, that follows the pattern alone, if there is one."""
    calls = {"dense": reader(dense, length), "patched": reader(patched, length)}
    if alone:
        calls["alone"] = reader(alone, length)
    repeats = repeats_for(sum(seconds_of(call) for call in calls.values()), budget=budget, least=3, most=most)
    times = interleaved(calls, repeats)
    row: dict[str, object] = {
        "length": length,
        "dense_s": times["dense"].median,
        "patched_s": times["patched"].median,
        "times": times["dense"].median / times["patched"].median,
        "times_minimum": times["dense"].minimum / times["patched"].minimum,
        "times_cpu": times["dense"].cpu / times["patched"].cpu,
    }
    if alone:
        row |= {
            "pattern_s": times["alone"].median,
            "of_pattern": times["alone"].median / times["patched"].median,
            "of_pattern_cpu": times["alone"].cpu / times["patched"].cpu,
        }
    return row


def _prompt(length: int) -> torch.Tensor:
    return torch.randint(1000, 40000, (1, length), generator=torch.Generator().manual_seed(0))


def reader(model: Callable[..., Any], length: int) -> Callable[[], object]:
    """A call that fills a new cache with random tokens, and computes the logits of the last one."""
    return torch.inference_mode()(partial(model, input_ids=_prompt(length), logits_to_keep=1))


def decoder(model: PreTrainedModel, length: int, steps: int, cache: Any = None) -> Callable[[], object]:
    """A call that takes `steps` tokens in turn after a cache of `length`, and then crops the cache again."""
    tokens = _prompt(length + steps)
    with torch.inference_mode():
        cache = model(input_ids=tokens[:, :length], logits_to_keep=1, **{CACHE_NAME: cache})[CACHE_NAME]

    @torch.inference_mode()
    def run() -> None:
        for step in range(length, length + steps):
            model(input_ids=tokens[:, step : step + 1], **{CACHE_NAME: cache})
        cache.crop(-steps)

    return run
