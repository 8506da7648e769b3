"""Routed heads beside windows of equal density and SDPA, on the queries, keys and values of a model that reads text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from committed import TOPOLOGIES
from inputs.checkpoints import QWEN_CODER_05B, load_model, load_tokenizer, model_folder
from inputs.texts import real_text, windows
from measure.dtypes import name_of
from measure.timing import interleaved
from suites.prefill import TOLERANCE
from suites.whole_model import decoder, reader
from surgeon.compiler import Topology, compile_package, read_topology
from surgeon.compiler.learn.measure.attending import attending, dense_attention, last_states
from surgeon.compiler.learn.routing.choosing import add_chosen, attending_as
from surgeon.compiler.schedule.schedule import LayerSchedule, schedule_layers
from surgeon.compiler.system.cache import cache_folder
from surgeon.compiler.topology.topology import mean_density
from surgeon.runtime import Package, SurgeonCache, load, patch
from surgeon.runtime.cache.block_pool import BlockPool
from surgeon.runtime.evaluate.pilot.run import twin
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.schedule import NODE

PAIRS = {
    4096: ("qwen2.5-coder-0.5b-12-routed-4096", "qwen2.5-coder-0.5b-12-4096"),
    8192: ("qwen2.5-coder-0.5b-12-routed-8192", "qwen2.5-coder-0.5b-11-8192"),
}
"""By length: a topology with routes, and windows that were learned for the same model and density."""

DTYPES = (torch.float32, torch.bfloat16)

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A layer's q, k and v, `[1, heads or KV heads, length, head_dim]`."""


@dataclass(frozen=True)
class Compiled:
    """A topology and its package."""

    topology: Topology
    package: Package


def prefill(variant: str | None) -> Iterator[dict[str, object]]:
    """The attention of all layers over a prompt; `of_windows` is the time of as many blocks of windows over ours."""
    model = load_model(_folder())
    for length in PAIRS:
        routed, static = _pair(length, variant)
        recorded = _states(model, length)
        density = {"routed": mean_density(routed.topology), "windows": mean_density(static.topology)}
        for dtype in DTYPES:
            states = [_cast(layer, dtype) for layer in recorded]
            error = _error(routed, states)
            calls: dict[str, Callable[[], object]] = {
                "routed": partial(_whole, routed.package, states),
                "windows": partial(_whole, static.package, states),
                "sdpa": partial(_whole_sdpa, states),
            }
            times = interleaved(calls, 5)
            row: dict[str, object] = {"length": length, "dtype": name_of(dtype)}
            row |= {f"{name}_density": round(value, 4) for name, value in density.items()}
            for name, timing in times.items():
                row |= {f"{name}_ms": timing.median * 1e3, f"{name}_cpu_ms": timing.cpu * 1e3}
            blocks = density["routed"] / density["windows"]
            row["of_windows"] = times["windows"].median / times["routed"].median * blocks
            row["of_windows_cpu"] = times["windows"].cpu / times["routed"].cpu * blocks
            row["times_sdpa"] = times["sdpa"].median / times["routed"].median
            yield row | {"error": error}


def decode(variant: str | None) -> Iterator[dict[str, object]]:
    """The attention of all layers for one token, with keys and values in memory and nodes kept, as in a SurgeonCache.

    `folded` is SDPA with the group of a KV head folded into the query length, its best form. The bytes are those of
    keys, values and nodes that one token reads.
    """
    model = load_model(_folder())
    for length in PAIRS:
        routed, static = _pair(length, variant)
        recorded = _states(model, length)
        for dtype in DTYPES:
            states = [_cast(layer, dtype) for layer in recorded]
            calls: dict[str, Callable[[], object]] = {
                "routed": _step(routed, states),
                "windows": _step(static, states),
                "folded": partial(_folded, states),
            }
            times = interleaved(calls, 30)
            row: dict[str, object] = {"length": length, "dtype": name_of(dtype)}
            row |= {f"{name}_us": timing.median / len(states) * 1e6 for name, timing in times.items()}
            row |= {
                "times_folded": times["folded"].median / times["routed"].median,
                "windows_times_folded": times["folded"].median / times["windows"].median,
                "routed_mb": _bytes_read(routed.topology, states) / 1e6,
                "windows_mb": _bytes_read(static.topology, states) / 1e6,
                "dense_mb": sum(k.nbytes + v.nbytes for _, k, v in states) / 1e6,
            }
            yield row


def whole_model(variant: str | None, steps: int = 8) -> Iterator[dict[str, object]]:
    """The first token and decoding of the model in fp32 by the pattern alone, each way with the cache that suits it."""
    dense = load_model(_folder())
    for length in PAIRS:
        models: dict[str, PreTrainedModel] = {"dense": dense}
        caches: dict[str, SurgeonCache | None] = {"dense": None}
        for name, made in zip(("routed", "windows"), _pair(length, variant), strict=True):
            models[name] = twin(dense)
            patch(models[name], made.package, recall="pattern")
            caches[name] = SurgeonCache(made.package)
        first = interleaved({name: reader(model, length) for name, model in models.items()}, 3)
        step = interleaved({name: decoder(models[name], length, steps, caches[name]) for name in models}, 5)
        row: dict[str, object] = {"length": length}
        row |= {f"{name}_s": timing.median for name, timing in first.items()}
        row |= {f"{name}_tokens_s": steps / timing.median for name, timing in step.items()}
        for name in ("routed", "windows"):
            row[f"{name}_first_token"] = first["dense"].median / first[name].median
            row[f"{name}_decoding"] = step["dense"].median / step[name].median
        yield row


def _folder() -> Path:
    return model_folder(QWEN_CODER_05B, cache_folder())


def _pair(length: int, variant: str | None) -> Iterator[Compiled]:
    for name in PAIRS[length]:
        topology = read_topology(TOPOLOGIES / f"{name}.json")
        package = compile_package(topology, cache_folder() / "kernels" / f"{name}-dtypes", targets=["cpu"])
        yield Compiled(topology, load(package, strict=True, cpu_variant=variant))


def _states(model: PreTrainedModel, length: int) -> list[States]:
    """What each layer's attention gets while the model reads a text densely."""
    found: list[States] = []

    def record(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        # Queries lie in memory as a projection leaves them, a token's heads side by side; keys as a cache does.
        found.append((q.transpose(1, 2).contiguous().transpose(1, 2), k.contiguous(), v.contiguous()))
        return dense_attention(q, k, v, scale)

    text = windows(load_tokenizer(_folder()), real_text(cache_folder()), length, most=1)[0]
    with torch.inference_mode(), attending(model, record):
        last_states(model, text)
    return found


def _cast(layer: States, dtype: torch.dtype) -> States:
    q, k, v = (tensor.to(dtype) for tensor in layer)
    return q, k, v


def _whole(package: Package, states: Sequence[States]) -> None:
    for layer, (q, k, v) in enumerate(states):
        package.attention(layer, q, k, v)


def _whole_sdpa(states: Sequence[States]) -> None:
    for q, k, v in states:
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _folded(states: Sequence[States]) -> None:
    for q, k, v in states:
        scaled_dot_product_attention(q[:, :, -1:].reshape(1, k.shape[1], -1, q.shape[3]), k, v)


def _step(made: Compiled, states: Sequence[States]) -> Callable[[], None]:
    """One token's attention in all layers, over pools of blocks that hold the whole text."""
    pools, operands = [], []
    for (q, k, v), schedule in zip(states, schedule_layers(made.topology), strict=True):
        pool = BlockPool(made.topology.block_size, k, v, _is_routed(schedule))
        pool.write(torch.tensor([0]), k, v)
        pools.append(pool)
        position = torch.tensor([k.shape[2] - 1])
        operands.append(Operands(q[:, :, -1:], pool.keys, pool.values, position, None, q.shape[3] ** -0.5))

    def run() -> None:
        for layer, (pool, given) in enumerate(zip(pools, operands, strict=True)):
            made.package.kernels.run_paged(layer, given, pool.table, nodes=pool.nodes)

    return run


def _is_routed(schedule: LayerSchedule) -> bool:
    return any(head.route for head in schedule.heads)


def _bytes_read(topology: Topology, states: Sequence[States]) -> int:
    """The bytes of keys, values and nodes that the last token reads in all layers."""
    total = 0
    for layer, ((q, k, v), schedule) in enumerate(zip(states, schedule_layers(topology), strict=True)):
        _, kv_heads, length, head_dim = k.shape
        blocks = length // topology.block_size
        # Of each KV head: its query heads, the last query alone, blocks.
        seen = torch.from_numpy(topology.block_mask(layer, blocks)[:, -1:]).unflatten(0, (kv_heads, -1))
        last = q[0, :, -1:].unflatten(0, (kv_heads, -1))
        for kv_head in range(kv_heads):
            add_chosen(list(seen[kv_head]), schedule, kv_head, last[kv_head], k[0, kv_head], length - 1)
            group = schedule.heads[kv_head * seen.shape[1] : (kv_head + 1) * seen.shape[1]]
            if any(head.route for head in group):
                total += length // NODE * head_dim
        read = int(seen.any(dim=1).sum()) * topology.block_size
        total += read * head_dim * (k.itemsize + v.itemsize)
    return total


def _error(made: Compiled, states: Sequence[States]) -> float:
    """The relative error of a middle layer's attention, beside plain torch in fp32 over the same choices.

    Raises:
        ArithmeticError: it is more than rounding explains.
    """
    layer = len(states) // 2
    q, k, v = states[layer]
    out = made.package.attention(layer, q, k, v).transpose(1, 2).float()
    exact = attending_as(made.topology)(layer, q.float(), k.float(), v.float(), q.shape[3] ** -0.5)
    error = float((out - exact).norm() / exact.norm())
    if not error < TOLERANCE[q.dtype]:
        raise ArithmeticError(f"routed attention is wrong: relative error {error:.1e}")
    return error
