"""Times compiled attention on a GPU against SDPA and FlexAttention; needs no network and no installation.

From a source tree, first on a machine without a GPU and then on one with a GPU:

    benchmarks/from_source python benchmarks/gpu.py --packages kernels-gpu --compile cuda:90
    benchmarks/from_source python benchmarks/gpu.py --packages kernels-gpu --json results.json

The second command compiles nothing. Each row is checked against fp64 on a sample of queries before it is timed.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from inputs import topologies as patterns
from inputs.topologies import Shape
from measure.checked import Tensors, checked
from surgeon.compiler import Topology, compile_package
from surgeon.compiler.tune.clock import timed
from surgeon.runtime import Package, load

SHAPE = Shape(heads=32, kv_heads=8, head_dim=128, block_size=128)  # Llama-3.1-8B
LENGTHS = (8192, 16384, 32768, 65536, 131072)
DENSITIES = (1.0, 0.5, 0.25, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="a folder for the compiled packages")
    parser.add_argument("--compile", metavar="TARGET", help="compile them for a target, and time nothing")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    arguments = parser.parse_args()
    if arguments.compile:
        for length, density in ((length, density) for length in arguments.lengths for density in DENSITIES):
            topology = patterns.windows(SHAPE, length, density)
            print(compile_package(topology, place(arguments.packages, topology), [arguments.compile], ["bf16"]))
        return
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py: expected a GPU that torch can use, got none; pass --compile to prepare for one")
    found = []
    for row in rows(arguments.packages, arguments.lengths):
        found.append(row)
        print(
            "  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{value}" for name, value in row.items())
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": found}, indent=1) + "\n")


def place(packages: Path, topology: Topology) -> Path:
    """The folder for a topology's package."""
    return packages / topology.sha256[:16]


def machine() -> dict[str, str]:
    """The card and the versions that the figures belong to."""
    return {
        "card": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or torch.version.hip),
        "python": platform.python_version(),
    }


def rows(packages: Path, lengths: Sequence[int]) -> Iterator[dict[str, object]]:
    """Yields the rows of prefill and decoding at each length and density."""
    for length in lengths:
        for density in DENSITIES:
            topology = patterns.windows(SHAPE, length, density)
            package = load(place(packages, topology), strict=True, device="cuda")
            for q_length in (length, 1):
                yield row(topology, package, length, q_length)


def row(topology: Topology, package: Package, length: int, q_length: int) -> dict[str, object]:
    """Makes one comparison: milliseconds by name, and our speed as a multiple of each peer's."""
    tensors = patterns.inputs(SHAPE, q_length, length, torch.bfloat16, device="cuda")
    q, k, v = tensors
    mask = torch.from_numpy(topology.block_mask(0, length // SHAPE.block_size)).cuda()
    density = float(mask.sum() / (len(mask) * mask.shape[1] * (mask.shape[1] + 1) / 2))
    if q_length == 1:
        density = float(mask[:, -1].sum() / mask[:, -1].numel())
    ours = partial(package.attention, 0, q, k, v)
    checked("ours", mask, SHAPE.block_size, tensors, ours())
    dense = partial(scaled_dot_product_attention, q, k, v, is_causal=q_length > 1, enable_gqa=True)
    calls: dict[str, Callable[[], object]] = {"ours": ours, "sdpa": dense}
    if q_length > 1:
        calls["cudnn"] = partial(with_cudnn, dense)
    if density < 1.0:
        flex = flexible(mask, tensors)
        checked("flex", mask, SHAPE.block_size, tensors, flex().transpose(1, 2))
        calls["flex"] = flex
    milliseconds = timed(calls, graphs=q_length == 1)
    result: dict[str, object] = {
        "phase": "prefill" if q_length > 1 else "decode",
        "length": length,
        "density": density,
        "launches": launches(ours),
    }
    result |= {f"{name}_ms": value for name, value in milliseconds.items()}
    result |= {f"times_{name}": value / milliseconds["ours"] for name, value in milliseconds.items() if name != "ours"}
    result["times_sdpa_x_density"] = milliseconds["sdpa"] / milliseconds["ours"] * density
    return result


def with_cudnn(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Runs the call with SDPA's cuDNN back end and no other."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return call()


def flexible(mask: torch.Tensor, tensors: Tensors) -> Callable[[], torch.Tensor]:
    """Compiled FlexAttention on the same blocks, the diagonal ones partial and all others full."""
    q, k, v = tensors
    offset = k.shape[2] - q.shape[2]
    blocks = mask[None] if offset == 0 else mask[None, :, -1:]
    diagonal = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    diagonal = (diagonal if offset == 0 else diagonal[-1:]).expand_as(blocks)

    def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return chosen.sum(dim=-1, dtype=torch.int32), order

    block_mask = BlockMask.from_kv_blocks(
        *listed(blocks & diagonal),
        *listed(blocks & ~diagonal),
        BLOCK_SIZE=SHAPE.block_size,
        mask_mod=lambda _b, _h, query, key: query + offset >= key,
        seq_lengths=(q.shape[2], k.shape[2]),
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, q, k, v, block_mask=block_mask, enable_gqa=True)


def launches(call: Callable[[], object]) -> int:
    """The number of kernels that one call launches."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events())


if __name__ == "__main__":
    main()
