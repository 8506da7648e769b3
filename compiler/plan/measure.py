"""Times one layer of a model on this machine: dense, with compiled windows, and without attention, in turn."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from surgeon.compiler.learn.measure.checkpoint import model_shape
from surgeon.compiler.learn.patterns.pattern import Grid, Pattern
from surgeon.compiler.learn.patterns.to_topology import pattern_topology
from surgeon.compiler.learn.patterns.windows import uniform_windows
from surgeon.compiler.pipeline import compile_package
from surgeon.compiler.plan.layer import one_layer
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.topology import mean_density
from surgeon.runtime.evaluate.pilot.run import twin
from surgeon.runtime.loading import Package, load
from surgeon.runtime.transformers.cache import CACHE_NAME, SurgeonCache
from surgeon.runtime.transformers.layers import find_attention
from surgeon.runtime.transformers.patching import patch
from surgeon.runtime.transformers.recall import PATTERN

_NO_ATTENTION = "surgeon_no_attention"
_PROMPT_SECONDS, _STEP_SECONDS = 20.0, 6.0  # what timing prompts and steps may take
_LEAST, _PROMPTS, _STEPS = 3, 15, 40  # rounds
_LARGER_THAN_A_CACHE = 2**26  # floats


@dataclass(frozen=True)
class Call:
    """Seconds of one call of the one-layer model, and of its layer within that."""

    whole: float
    layer: float


Calls = Mapping[str, tuple[Call, ...]]
"""Calls by model, equally many of each: those of a round stand at the same place."""


@dataclass(frozen=True)
class LayerTimes:
    """The measurements of one layer.

    `prompts` are of the models "dense", "patched" and "bare", which has no attention, `steps` of the first two: one
    token after a prompt. `density` is that of the compiled windows, `recall` that of the patched model; the caches are
    those of one layer after a prompt.
    """

    prompts: Calls
    steps: Calls
    density: float
    recall: str
    dense_cache_bytes: int
    kept_cache_bytes: int


def measure_layer(
    config: PreTrainedConfig, grid: Grid, recall: str, scratch: Path, progress: Progress | None = None
) -> LayerTimes:
    """Times a layer of random weights on sequences as long as the grid, on the CPU in fp32.

    `recall` is that of `patch`; `scratch` is an empty folder for the package of equal windows.

    Raises:
        TopologyError: the density is out of reach.
        BuildError: no C++ compiler is found, or it fails.
        PatchError: the model cannot be patched.
    """
    dense = one_layer(config)
    shape = model_shape(dense)
    windows = Pattern(uniform_windows(1, shape.num_attention_heads, grid.blocks, grid.sink, grid.density))
    topology = pattern_topology(shape, grid, windows, {"method": "window"})
    package = load(compile_package(topology, scratch / "kernels", dtypes=("fp32",), progress=progress))
    patched, bare = twin(dense), twin(dense)
    patch(patched, package, recall=recall)
    AttentionInterface.register(_NO_ATTENTION, _no_attention)
    bare.config._attn_implementation = _NO_ATTENTION
    models = {"dense": dense, "patched": patched, "bare": bare}
    length = grid.blocks * grid.block_size
    tokens = torch.randint(config.get_text_config().vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        clocks = {name: _Clock(model) for name, model in models.items()}
        for clock in clocks.values():  # the first call makes what later ones find
            clock.call(tokens[:, : 2 * grid.block_size])
        prompts = in_turn(
            {name: lambda clock=clock: clock.call(tokens)[0] for name, clock in clocks.items()},  # type: ignore[misc]
            _PROMPT_SECONDS,
            _PROMPTS,
            lambda done: progress and progress("timing prompts", done, _PROMPTS),
        )
        caches = {name: clocks[name].call(tokens)[1] for name in ("dense", "patched")}
        steps = in_turn(
            {name: lambda name=name: _step(clocks[name], tokens, caches[name]) for name in caches},  # type: ignore[misc]
            _STEP_SECONDS,
            _STEPS,
            _flusher(),
        )
        (layer,) = caches["dense"].layers
        whole = int(layer.keys.nbytes + layer.values.nbytes)
        return LayerTimes(
            prompts=prompts,
            steps=steps,
            density=mean_density(topology),
            recall=recall,
            dense_cache_bytes=whole,
            kept_cache_bytes=_kept_bytes(patched, package, tokens) if recall == PATTERN else whole,
        )


def in_turn(
    calls: Mapping[str, Callable[[], Call]], seconds: float, most: int, before: Callable[[int], object]
) -> dict[str, tuple[Call, ...]]:
    """Makes rounds of the calls until they have taken so long, at least three and at most `most`.

    The order rotates by one each round; `before` is called before each call with the number of rounds that are done.
    """
    found: dict[str, list[Call]] = {name: [] for name in calls}
    order = list(calls)
    started = time.perf_counter()
    for done in range(most):
        if done >= _LEAST and time.perf_counter() - started >= seconds:
            break
        for name in order:
            before(done)
            found[name].append(calls[name]())
        order.append(order.pop(0))
    return {name: tuple(each) for name, each in found.items()}


class _Clock:
    """Times the calls of a one-layer model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._marks: list[float] = []
        ((name, _),) = find_attention(model)
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.register_forward_pre_hook(lambda *_: self._marks.append(time.perf_counter()))
        layer.register_forward_hook(lambda *_: self._marks.append(time.perf_counter()))

    def call(self, tokens: torch.Tensor, cache: Any = None) -> tuple[Call, Any]:
        """Reads tokens `[1, length]`, and returns the cache too."""
        self._marks.clear()
        started = time.perf_counter()
        output = self._model(input_ids=tokens, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
        whole = time.perf_counter() - started
        entered, left = self._marks
        return Call(whole, left - entered), output[CACHE_NAME]


def _step(clock: _Clock, tokens: torch.Tensor, cache: Any) -> Call:
    found, _ = clock.call(tokens[:, -1:], cache)
    cache.crop(-1)
    return found


def _flusher() -> Callable[[int], object]:
    """Makes a call that evicts the layer's weights, which in the whole model those of the other layers do."""
    numbers = torch.zeros(_LARGER_THAN_A_CACHE)
    return lambda _: numbers.sum()


def _kept_bytes(patched: PreTrainedModel, package: Package, tokens: torch.Tensor) -> int:
    cache = SurgeonCache(package)
    patched(input_ids=tokens, **cache.argument, use_cache=True, logits_to_keep=1)
    return cache.kept_bytes()


def _no_attention(_module: torch.nn.Module, query: torch.Tensor, *_: Any, **_extras: Any) -> tuple[torch.Tensor, None]:
    """Returns the queries in place of an attention's output, which has their shape."""
    return query.transpose(1, 2), None
