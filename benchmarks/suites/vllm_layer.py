"""Attention of one layer beside vLLM's own CPU kernels, on pages of a cache. It runs in vLLM's environment.

Both sides get what vLLM gives its attention: the queries of a step one behind the other, block tables, and what is made
once a step for all layers. Each keeps keys and values in the order of its own within the same pages.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import vllm
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from inputs.topologies import compiled
from measure.checked import WrongResultError
from measure.dtypes import name_of
from measure.timing import Timing, interleaved
from suites.prefill import TOLERANCE
from surgeon.compiler import Topology, read_topology
from surgeon.compiler.tune.exact import sampled_error
from surgeon.runtime import Package
from surgeon.runtime.operands import PATTERN_ALONE
from surgeon.runtime.packed_batch import PackedBatch
from surgeon.runtime.vllm.pages.layout import PageLayout

TOPOLOGIES = Path(__file__).parents[1] / "topologies"
DENSITY = 0.25
PAGE = 128  # tokens, as vLLM has it on CPUs if nobody asks for another
DTYPES = (torch.float32, torch.bfloat16)
COPIES = 4  # of the pages, so that a call finds its own in memory and not in the CPU's caches, as a model's layer does


def prefill(variant: str | None) -> Iterator[dict[str, object]]:
    """The whole of a prompt of 4,096 tokens."""
    for dtype in DTYPES:
        yield _attention_row("smollm2-135m-24-answers-4096", variant, Step.random(dtype, 1, 4096, 4096), 20)


def decode(variant: str | None) -> Iterator[dict[str, object]]:
    """The next token of each of eight sequences of 8,192 tokens."""
    for dtype in DTYPES:
        yield _attention_row("smollm2-135m-23-answers-8192", variant, Step.random(dtype, 8, 1, 8192), 60)


def write(variant: str | None) -> Iterator[dict[str, object]]:
    """New keys and values into their pages: one token of each of eight sequences, and 2,048 of one."""
    _, package, layer = _layer("smollm2-135m-24-answers-4096", variant)
    for dtype, (sequences, tokens) in itertools.product(DTYPES, ((8, 1), (1, 2048))):
        step = Step.random(dtype, sequences, tokens, 2048)
        new = (slice(None), slice(-tokens, None))
        given = step.k[new].flatten(0, 1), step.v[new].flatten(0, 1), step.slots[new].flatten().contiguous()
        calls = {name: partial(side.write, *given, step.pages()) for name, side in _sides(package, layer, step).items()}
        row = {"vllm": vllm.__version__, "dtype": step.dtype_name, "sequences": sequences, "tokens": tokens}
        yield row | _figures(interleaved(calls, 300), 1e6, "us")


@dataclass(frozen=True)
class Step:
    """One layer's part of an engine's step: the last queries of sequences of one length, over all keys and values.

    q is `[tokens, heads, head_dim]`, k and v are `[sequences, length, KV heads, head_dim]`. `table`, int32
    `[sequences, pages]`, holds pages in random order; page 0 is nobody's.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor

    @classmethod
    def random(cls, dtype: torch.dtype, sequences: int, queries: int, length: int) -> "Step":
        """A step of SmolLM2-135M's heads."""
        heads, kv_heads, head_dim = 9, 3, 64
        q = torch.randn(sequences * queries, heads, head_dim).to(dtype)
        k, v = torch.randn(2, sequences, length, kv_heads, head_dim).to(dtype)
        table = 1 + torch.randperm(sequences * length // PAGE, dtype=torch.int32).view(sequences, -1)
        return cls(q, k, v, table)

    @property
    def slots(self) -> torch.Tensor:
        """The place of each token, int64 `[sequences, length]`: page times page tokens plus the place in the page."""
        return (self.table.long()[:, :, None] * PAGE + torch.arange(PAGE)).flatten(1)

    @property
    def queries(self) -> torch.Tensor:
        """The queries of each sequence, `[sequences, heads, queries, head_dim]`."""
        queries: torch.Tensor = self.q.unflatten(0, (len(self.k), -1)).transpose(1, 2)
        return queries

    @property
    def starts(self) -> torch.Tensor:
        """The first query of each sequence, and the end of the last one's, int32 `[sequences + 1]`."""
        return torch.arange(len(self.k) + 1, dtype=torch.int32) * self.queries.shape[2]

    @property
    def lengths(self) -> torch.Tensor:
        """The tokens of each sequence, int32 `[sequences]`."""
        return torch.full((len(self.k),), self.k.shape[1], dtype=torch.int32)

    @property
    def dtype_name(self) -> str:
        """The dtype without its module."""
        return name_of(self.q.dtype)

    def pages(self) -> torch.Tensor:
        """An empty cache, `[pages, KV heads, page tokens, 2 * head_dim]`."""
        kv_heads, head_dim = self.k.shape[2:]
        return torch.zeros(self.table.numel() + 1, kv_heads, PAGE, 2 * head_dim, dtype=self.q.dtype)


class Side(Protocol):
    """The two calls of a layer in a step."""

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor) -> None:
        """Writes keys and values `[tokens, KV heads, head_dim]` into pages."""

    def attend(self, pages: torch.Tensor) -> torch.Tensor:
        """Attention of the step's queries, `[tokens, heads, head_dim]`."""


class Ours:
    """A package's kernels as the plugin calls them, on the pattern's blocks."""

    def __init__(self, package: Package, layer: int, step: Step) -> None:
        self.kernels, self.layer, self.q, self.out = package.kernels, layer, step.q, torch.empty_like(step.q)
        self.scale = step.q.shape[2] ** -0.5
        self.layout = PageLayout(PAGE, step.k.shape[2], package.manifest.block_size)
        table = self.layout.block_table(step.table, step.lengths)
        tails = torch.full((len(step.k),), PATTERN_ALONE)
        positions = step.lengths - step.queries.shape[2]
        self.batch = PackedBatch(step.starts, positions, tails, table, self.layout.block_size)

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor) -> None:
        """Writes keys and values into pages, in natural order."""
        self.kernels.write_pages(k, v, slots, pages)

    def attend(self, pages: torch.Tensor) -> torch.Tensor:
        """Attention to the blocks of the layer's pattern."""
        keys, values = self.layout.pools(pages)
        self.kernels.run_packed(self.layer, self.batch, self.q, keys, values, self.scale, self.out)
        return self.out


class Theirs:
    """vLLM's own kernels as its backend calls them, on every block."""

    def __init__(self, step: Step) -> None:
        self.step, self.out = step, torch.empty_like(step.q)
        heads, kv_heads, head_dim = step.q.shape[1], *step.k.shape[2:]
        self.isa = _get_attn_isa(step.q.dtype, PAGE, head_dim)
        self.metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(step.k),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            seq_lens=step.lengths,
            dtype=step.q.dtype,
            query_start_loc=step.starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        self.starts, self.lengths = step.starts, step.lengths

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor) -> None:
        """Writes keys and values into pages, in the order of vLLM's kernels."""
        ops.cpu_attn_reshape_and_cache(k, v, *self._halves(pages), slots, self.isa)

    def attend(self, pages: torch.Tensor) -> torch.Tensor:
        """Attention to everything."""
        keys, values = self._halves(pages)
        ops.cpu_attention_with_kv_cache(
            query=self.step.q,
            key_cache=keys,
            value_cache=values,
            output=self.out,
            query_start_loc=self.starts,
            seq_lens=self.lengths,
            scale=self.step.q.shape[2] ** -0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.step.table,
            softcap=0,
            scheduler_metadata=self.metadata,
            s_aux=None,
        )
        return self.out

    @staticmethod
    def _halves(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = pages.view(*pages.shape[:2], 2 * PAGE, -1).chunk(2, dim=2)
        return keys, values


def _layer(name: str, variant: str | None) -> tuple[Topology, Package, int]:
    """A committed topology, its package, and the layer whose density is nearest to a quarter."""
    topology = read_topology(TOPOLOGIES / f"{name}.json")
    layers = range(len(topology.layers))
    return (
        topology,
        compiled(topology, variant),
        min(layers, key=lambda layer: abs(_density(topology, layer) - DENSITY)),
    )


def _density(topology: Topology, layer: int) -> float:
    mask = topology.block_mask(layer, topology.num_blocks)
    heads, rows, _ = mask.shape
    share: float = mask.sum() / (heads * rows * (rows + 1) / 2)
    return share


def _sides(package: Package, layer: int, step: Step) -> dict[str, Side]:
    return {"ours": Ours(package, layer, step), "vllm": Theirs(step)}


def _attention_row(name: str, variant: str | None, step: Step, repeats: int) -> dict[str, object]:
    topology, package, layer = _layer(name, variant)
    mask = torch.from_numpy(topology.block_mask(layer, step.k.shape[1] // topology.block_size))
    visible = {"ours": mask, "vllm": torch.ones_like(mask)}
    row: dict[str, object] = {
        "vllm": vllm.__version__,
        "topology": name,
        "layer": layer,
        "density": round(_density(topology, layer), 4),
        "dtype": step.dtype_name,
        "sequences": len(step.k),
        "queries": step.queries.shape[2],
        "length": step.k.shape[1],
    }
    calls: dict[str, Callable[[], object]] = {}
    for whose, side in _sides(package, layer, step).items():
        caches = [step.pages() for _ in range(COPIES)]
        for pages in caches:
            side.write(step.k.flatten(0, 1), step.v.flatten(0, 1), step.slots.flatten(), pages)
        error, tolerance = (
            _error(visible[whose], topology.block_size, step, side.attend(caches[0])),
            TOLERANCE[step.q.dtype],
        )
        if not error < tolerance:
            raise WrongResultError(f"{whose}, {row}: expected a relative error below {tolerance}, got {error:.1e}")
        row[f"{whose}_error"] = error
        calls[whose] = partial(_on_next, side, itertools.cycle(caches))
    return row | _figures(interleaved(calls, repeats), 1e3, "ms")


def _error(mask: torch.Tensor, block_size: int, step: Step, out: torch.Tensor) -> float:
    """The largest relative error of a sequence's output against fp64."""
    found = out.unflatten(0, (len(step.k), -1))
    errors: list[float] = []
    for i, queries in enumerate(step.queries):
        keys, values = step.k[i].transpose(0, 1), step.v[i].transpose(0, 1)
        errors.append(sampled_error(mask, block_size, queries[None], keys[None], values[None], found[i, None]))
    return max(errors)


def _on_next(side: Side, caches: Iterator[torch.Tensor]) -> None:
    side.attend(next(caches))


def _figures(times: Mapping[str, Timing], units: float, unit: str) -> dict[str, object]:
    """Medians and minima of both, by the clock and of CPU time, and how many times as long vLLM takes."""
    row: dict[str, object] = {}
    for name in ("median", "minimum", "cpu", "cpu_minimum"):
        found = {whose: getattr(timing, name) for whose, timing in times.items()}
        row |= {f"{whose}_{name}_{unit}": seconds * units for whose, seconds in found.items()}
        row[f"times_{name}"] = found["vllm"] / found["ours"]
    return row
