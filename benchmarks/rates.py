"""Measures what decides between kernels and torch's dense attention, and writes it to `runtime/kernels/cpu/rates.json`.

Run it with `make rates`, on any machine: it replaces what the file says of processors like this one. A rate is torch's
time over a variant's own, in CPU seconds of calls made in turn, where every block is seen; of several shapes the least
counts, so that no call gets slower. `--level` limits torch and the kernels to what a lesser processor has.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from functools import partial

# Which instructions torch's libraries use is settled when they are loaded.
_LIMITS = {
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
_VARIANTS = {"amx": "x86_64_amx", "avx512_bf16": "x86_64_v4", "avx512": "x86_64_v4", "avx2": "x86_64_v3"}
"""The fastest variant of each level."""


def main() -> int:
    """Measures one level and returns the exit status."""
    from surgeon.runtime.kernels.cpu.rates import LEVELS, processor_features, processor_level

    own = processor_level(processor_features())
    levels = list(LEVELS)[list(LEVELS).index(own) :] if own in LEVELS else [own]
    parser = argparse.ArgumentParser(description="Measure the CPU kernels beside torch's dense attention.")
    parser.add_argument("--level", choices=levels, default=own, help="what torch and the kernels may use")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    limits = {} if options.level == own else _LIMITS[options.level]
    settings = {"OMP_WAIT_POLICY": "passive"} | limits
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)
    measure(options.level, options.threads, limited=bool(limits))
    return 0


def measure(level: str, threads: int, limited: bool) -> None:
    """Measures each variant of a level and replaces the level's entry in the file."""
    import torch

    from inputs import topologies
    from inputs.topologies import Shape
    from measure.timing import interleaved, machine, repeats_for, seconds_of
    from surgeon.runtime.kernels.cpu.rates import DECODE, FILE
    from surgeon.runtime.kernels.cpu.sdpa import attend
    from surgeon.runtime.operands import Operands

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    prefill = {str(length): (length, length) for length in (64, 256, 1024, 4096)}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for shape in (Shape(9, 3, 64, 64), Shape(8, 2, 128, 64), Shape(4, 4, 64, 64)):
        topology = topologies.windows(shape, 8192, 1.0)
        calls = {DECODE[shape.heads > shape.kv_heads]: (1, 2048)} | prefill
        usable = topologies.compiled(topology, None).cpu_variants
        fastest = _VARIANTS.get(level, usable[0])
        variants = usable[usable.index(fastest) :]
        packages = {variant: topologies.compiled(topology, variant) for variant in variants}
        for package in packages.values():  # what is to be decided must not decide here
            kernels = package.kernels.devices.cpu
            kernels.dense_rows = replace(kernels.dense_rows, rates={})
        for (dtype_name, dtype), (call, (queries, keys)) in (
            (dtype, call) for dtype in dtypes.items() for call in calls.items()
        ):
            q, k, v = topologies.inputs(shape, queries, keys, dtype)
            operands = Operands(q, k, v, None, None, shape.head_dim**-0.5)
            timed = {"sdpa": partial(attend, operands, keys)} | {
                variant: partial(package.attention, 0, q, k, v) for variant, package in packages.items()
            }
            seconds = sum(seconds_of(function) for function in timed.values())
            times = interleaved(timed, repeats_for(seconds, budget=2.0, least=3, most=100))
            for variant in variants:
                found = rates.setdefault(variant, {}).setdefault(dtype_name, {})
                rate = times["sdpa"].cpu / times[variant].cpu
                found[call] = round(min(rate, found.get(call, rate)), 2)
                print(f"{shape} {dtype_name} {call}: {variant} {rate:.2f}", flush=True)
    stored = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"levels": {}, "measured": {}}
    stored["levels"][level] = rates
    stored["measured"][level] = machine() | {"limited": limited}
    FILE.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
