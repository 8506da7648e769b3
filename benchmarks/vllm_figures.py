"""The figures of vLLM, alone and on the package's kernels, as rows of a table: what was measured, and what came out."""

from collections.abc import Iterator

from committed import for_answers, read, share, suite


def beside_vllm() -> Iterator[tuple[str, str]]:
    """The calls of one layer in a step of vLLM, by the least CPU time of each side."""
    dtypes = {"float32": "fp32", "bfloat16": "bf16"}
    for row in (*suite("vllm-prefill")["rows"], *suite("vllm-decode")["rows"]):
        length = f"{row['length']:,} tokens"
        step = (
            f"a prompt of {length}" if row["sequences"] == 1 else f"decoding {row['sequences']} sequences of {length}"
        )
        yield (
            f"attention of one layer of SmolLM2-135M on vLLM's pages, {step}, {share(row)}, "
            f"{dtypes[row['dtype']]} (**)",
            f"{row['ours_cpu_minimum_ms']:.2f} ms, vLLM {row['vllm']}'s own kernels "
            f"{row['vllm_cpu_minimum_ms']:.2f} ms: {row['times_cpu_minimum']:.2f}x",
        )
    for row in suite("vllm-write")["rows"]:
        if row["tokens"] > 1:
            yield (
                f"keys and values of {row['tokens']:,} tokens written into those pages, {dtypes[row['dtype']]} (**)",
                f"{row['ours_cpu_minimum_us'] / 1e3:.2f} ms, vLLM's own {row['vllm_cpu_minimum_us'] / 1e3:.2f} ms: "
                f"{row['times_cpu_minimum']:.2f}x",
            )


def served() -> Iterator[tuple[str, str]]:
    """vLLM's servers: the first token of a prompt alone, requests at once, and the cache in use."""
    rows = read("serving")["rows"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        dense, recalled, pattern = (row for row in rows if row["dtype"] == dtype)
        blocks, length = share(for_answers(dense["topology"])), f"{dense['prompt']:,} tokens"
        for what, name in (
            (f"first token of a prompt of {length}", "first"),
            (f"{dense['requests']} requests at once of up to {length}, which share prefixes", "requests"),
        ):
            clock, cpu = f"{name}_s", f"{name}_cpu_s"
            yield (
                f"vLLM's server of SmolLM2-135M, {what}, {blocks}, {dtype}",
                f"{recalled[clock]:.1f} s, vLLM alone {dense[clock]:.1f} s: {dense[clock] / recalled[clock]:.2f}x, of "
                f"CPU time {dense[cpu] / recalled[cpu]:.2f}x; by the pattern alone {pattern[clock]:.1f} s",
            )
        yield (
            f"cache that it has in use after {length} by the pattern alone, {dtype}",
            f"{pattern['cache_used'] / dense['cache_used']:.0%} of vLLM alone",
        )
