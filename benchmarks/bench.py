"""Runs the benchmarks, writes `results/*.json` and prints tables. Run it with `make bench`.

Every result is a ratio of calls made in turn in this one process, after each was checked. Times are medians; diagonal
blocks count half. `--isa avx2` limits torch and our kernels to AVX2, on processors that have more.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

# torch's libraries settle the behaviour of waiting threads and their instruction set when they are loaded.
_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
_ONLY_IN_THE_FILE = ("_min_ms", "_min_us", "_cpu_ms", "_minimum_ms", "_minimum_us", "_cpu_minimum", "_cpu_us")
_VARIANTS = {"native": None, "avx2": "x86_64_v3"}
RESULTS = Path(__file__).parent / "results"

Suite = Callable[[str | None], Iterator[dict[str, object]]]


def main() -> int:
    """Runs the chosen suites and returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure Surgeon's CPU kernels against their peers.")
    parser.add_argument("--isa", choices=_VARIANTS, default="native", help="the widest instructions to use")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("suites", nargs="*", help="suites to run; all of them by default")
    options = parser.parse_args()
    # A kernel that torch compiled for one instruction set gives wrong results if its cache serves it for another.
    compiled = str(Path(tempfile.gettempdir()) / f"surgeon-bench-inductor-{options.isa}")
    settings = {"OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_CACHE_DIR": compiled}
    settings |= _AVX2 if options.isa == "avx2" else {}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)
    return run(options.suites, options.isa, options.threads)


def run(chosen: list[str], isa: str, threads: int) -> int:
    """Runs the suites one after another; each writes its own file."""
    import torch
    import transformers
    from rich.console import Console

    from measure.timing import machine
    from suites import compile_gpu, decode, growth, prefill, routed, whole_model

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    suites: dict[str, Suite] = {
        "prefill-gemm": prefill.against_gemm,
        "prefill-dtypes": prefill.against_dtypes,
        "prefill-peers": prefill.against_peers,
        "prefill-bf16": prefill.against_sdpa_in_bf16,
        "decode": decode.against_sdpa,
        "overhead": decode.overhead,
        "short-call": decode.short_call,
        "growth-length": growth.with_length,
        "growth-density": growth.with_density,
        "growth-threads": growth.with_threads,
        "compile-gpu": compile_gpu.llama_8b,
        "model-first-token": whole_model.time_to_first_token,
        "model-ways": whole_model.ways_to_run,
        "model-short": whole_model.short_prompts,
        "model-decode": whole_model.decoding,
        "model-cache": whole_model.caching,
        "routed-prefill": routed.prefill,
        "routed-decode": routed.decode,
        "model-routed": routed.whole_model,
    }
    if find_spec("vllm") is not None:  # in the environment of `make test-vllm`
        from suites import vllm_layer

        suites |= {
            "vllm-prefill": vllm_layer.prefill,
            "vllm-decode": vllm_layer.decode,
            "vllm-write": vllm_layer.write,
        }
    console = Console(highlight=False, width=140)
    unknown = [name for name in chosen if name not in suites]
    if unknown:
        console.print(f"bench: expected suites among {', '.join(suites)}, got {', '.join(unknown)}", style="red")
        return 2
    RESULTS.mkdir(exist_ok=True)
    for name in chosen or suites:
        description = machine()
        rows = []
        for row in suites[name](_VARIANTS[isa]):
            rows.append(row)
            console.print(f"{name}: " + ", ".join(f"{key} {_shown(value)}" for key, value in row.items()), style="dim")
        result = {"suite": name, "isa": isa, "machine": description, "rows": rows}
        (RESULTS / f"{name}-{isa}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(_table(f"{name} ({isa})", rows))
    return 0


def _table(title: str, rows: list[dict[str, object]]) -> object:
    from rich.table import Table

    table = Table(title=title)
    keys = [key for key in rows[0] if not key.endswith(_ONLY_IN_THE_FILE)]
    for key in keys:
        table.add_column(key.replace("_", "\n"), justify="right")
    for row in rows:
        table.add_row(*(_shown(row[key]) if key in row else "–" for key in keys))
    return table


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
