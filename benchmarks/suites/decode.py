"""One decoding step of one layer: our kernel against three forms of SDPA, and the speed of memory itself."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from inputs import topologies as patterns
from inputs.topologies import Shape
from measure.dtypes import name_of
from measure.timing import interleaved, repeats_for, seconds_of
from suites.prefill import TOLERANCE
from surgeon.runtime.operands import Operands
from surgeon.runtime.transformers.attention import Site, bind
from surgeon.runtime.transformers.attention import attention as layer_attention

Attention = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # takes k and v


def against_sdpa(variant: str | None) -> Iterator[dict[str, object]]:
    """Dense and sparse decoding at several cache lengths.

    `folded` is SDPA with the group of a KV head folded into the query length, its best form; `gather` first picks the
    visible keys, which works if all heads of the layer see the same ones. `bandwidth` is the visible bytes of k and v
    over the time, against that of summing 64 MiB of floats. Each call reads another copy of k and v; there are so many
    copies that each is in memory and no longer in the CPU's caches when its turn comes, as it would be in a model.
    """
    block = 64
    large = torch.randn(64 * 2**20 // 4)
    shapes, lengths, densities = ((8, 8, 128), (32, 8, 128), (9, 3, 64)), (2048, 8192, 32768), (1.0, 0.25)
    for dtype, (heads, kv_heads, head_dim), length, density in (
        *itertools.product((torch.float32,), shapes, lengths, densities),
        *itertools.product((torch.bfloat16,), shapes[1:], lengths[1:], densities),
    ):
        shape = Shape(heads, kv_heads, head_dim, block)
        topology = patterns.windows(shape, length, density)
        package = patterns.compiled(topology, variant)
        q, k, v = patterns.inputs(shape, 1, length, dtype)
        mask = topology.block_mask(0, length // block)
        row_mask = mask[:, -1:]
        reference = _masked(q, k, v, torch.from_numpy(row_mask).repeat_interleave(block, dim=-1)[None])
        out = package.attention(0, q, k, v)
        error = float((out.double() - reference).norm() / reference.norm())
        if not error < TOLERANCE[dtype]:
            raise ArithmeticError(f"decoding is wrong: relative error {error:.1e}")

        seen = torch.from_numpy(np.any(row_mask[:, 0], axis=0)).repeat_interleave(block).nonzero()[:, 0]
        folded_q = q.reshape(1, kv_heads, heads // kv_heads, head_dim)
        copies = 1 + 128 * 2**20 // (k.nbytes + v.nbytes)
        cache = itertools.cycle([(k, v)] + [(k.clone(), v.clone()) for _ in range(copies - 1)])
        attentions: dict[str, Attention] = {
            "ours": partial(package.attention, 0, q),
            "sdpa": partial(scaled_dot_product_attention, q, enable_gqa=True),
            "folded": partial(scaled_dot_product_attention, folded_q),
            "gather": partial(_gathered, folded_q, seen),
        }
        calls: dict[str, Callable[[], object]] = {
            name: partial(_of_next, attention, cache) for name, attention in attentions.items()
        }
        calls["read"] = large.sum
        times = interleaved(calls, repeats_for(sum(seconds_of(call) for call in calls.values()), budget=3.0, least=9))
        share = float(row_mask.mean())
        group = heads // kv_heads
        union = row_mask[:, 0].reshape(kv_heads, group, -1).any(axis=1).mean()
        visible_bytes = float(union) * (k.nbytes + v.nbytes)
        ours = times["ours"].median
        yield {
            "heads": f"{heads}/{kv_heads}",
            "head_dim": head_dim,
            "length": length,
            "dtype": name_of(dtype),
            "density": density,
            "share_of_blocks": round(share, 4),
            "ours_us": ours * 1e6,
            "ours_min_us": times["ours"].minimum * 1e6,
            "times_sdpa": times["sdpa"].median / ours,
            "times_folded": times["folded"].median / ours,
            "times_gather": times["gather"].median / ours,
            "times_sdpa_x_share": times["sdpa"].median / ours * share,
            "bandwidth_gb_s": visible_bytes / ours / 1e9,
            "of_read": visible_bytes / ours / (large.numel() * 4 / times["read"].median),
        }


def overhead(variant: str | None) -> Iterator[dict[str, object]]:
    """The cost of a call with next to nothing to do: one query on 64 keys that are in the CPU's caches.

    In plain inference a call goes straight to the kernel; elsewhere torch's dispatcher takes it to the op.
    """
    shape = Shape(9, 3, 64, 64)
    package = patterns.compiled(patterns.windows(shape, 256, 1.0), variant)
    q, k, v = patterns.inputs(shape, 1, 64, torch.float32)
    op = partial(torch.ops.surgeon.attention, q, k, v, None, None, 64**-0.5, 0, 0, package.id, 0)
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(package.attention, 0, q, k, v),
        "op": op,
        "sdpa": partial(scaled_dot_product_attention, q, k, v, enable_gqa=True),
    }
    with torch.inference_mode():
        times = interleaved(calls, 2000)
    yield {f"{name}_us": times[name].median * 1e6 for name in calls}


def short_call(variant: str | None) -> Iterator[dict[str, object]]:
    """One query behind 64 and 2,048 keys, as a layer of a patched model calls it after 64 MiB of other memory.

    A model's weights leave nothing of a layer's code, keys and tables in the CPU's caches until its next call. `python`
    is what a package without the direct op would run in its place. Beside them stands what torch alone takes for two
    parts of the work, without anything around it: `empty` makes a tensor of the result's shape, and `read` sums as many
    bytes of floats as the kernel reads of keys and values.
    """
    shape, large = Shape(9, 3, 64, 64), torch.zeros(64 * 2**20 // 4)
    topology = patterns.windows(shape, 2048, 0.25)
    package = patterns.compiled(topology, variant)
    module = torch.nn.Module()
    bind(module, Site(package, 0, 0, package.kernels.direct(0)))
    for dtype, keys in itertools.product((torch.float32, torch.bfloat16), (64, 2048)):
        q, k, v = patterns.inputs(shape, 1, keys, dtype)
        position, cache_leftpad = torch.tensor([keys - 1]), torch.tensor([0])
        placement = torch.stack((position, cache_leftpad), dim=1)[:, None, :, None].expand(1, 1, 2, keys)
        operands = Operands(q, k, v, position, cache_leftpad, 64**-0.5)
        num_blocks = keys // shape.block_size
        seen = topology.block_mask(0, num_blocks)[:, -1].reshape(shape.kv_heads, -1, num_blocks)
        read = torch.zeros(int(seen.any(axis=1).mean() * (k.nbytes + v.nbytes)) // 4)
        calls: dict[str, Callable[[], object]] = {
            "ours": partial(layer_attention, module, q, k, v, placement, scaling=64**-0.5, use_cache=True),
            "python": partial(package.kernels.run, 0, operands),
            "sdpa": partial(scaled_dot_product_attention, q, k, v, enable_gqa=True),
            "empty": partial(torch.empty, (1, 1, shape.heads, shape.head_dim), dtype=dtype),
            "read": read.sum,
        }
        with torch.inference_mode():
            times = interleaved(calls, 300, partial(large.add_, 1.0))
        row: dict[str, object] = {"dtype": name_of(dtype), "keys": keys, "read_bytes": read.nbytes}
        for name, timing in times.items():
            row |= {f"{name}_us": timing.median * 1e6, f"{name}_min_us": timing.minimum * 1e6}
            row[f"{name}_cpu_us"] = timing.cpu * 1e6
        yield row


def _of_next(attention: Attention, cache: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return attention(*next(cache))


def _gathered(q: torch.Tensor, seen: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k.index_select(2, seen), v.index_select(2, seen))


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The fp64 reference, `[batch, 1, heads, head_dim]`."""
    group = q.shape[1] // k.shape[1]
    k, v = (tensor.double().repeat_interleave(group, dim=1) for tensor in (k, v))
    scores = (q.double() @ k.transpose(-1, -2) * q.shape[3] ** -0.5).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)
