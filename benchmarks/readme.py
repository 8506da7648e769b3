"""Puts the measured figures into the README, between its two marks.

Run it after `make bench`, `make pilot` and `benchmarks/demo.py --save benchmarks/results/demo-native.json`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgeon.compiler.pilot.table import passkeys
from surgeon.runtime.evaluate.pilot_file import Pilot, read_pilot

FOLDER = Path(__file__).parent
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- figures: benchmarks/readme.py -->", "<!-- end of figures -->"

Row = dict[str, Any]


def main() -> int:
    """Rewrites the README and returns the exit status."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        print(f"readme: expected the marks {BEGIN} and {END} in {README.name}, got none", file=sys.stderr)
        return 2
    README.write_text(f"{before}{BEGIN}\n{table()}{END}{after}", encoding="utf-8")
    return 0


def table() -> str:
    """The figures as Markdown; every one stands in a file of `results/`."""
    lines = ["| measured | Surgeon beside its peer |", "|---|---|", *_lines()]
    described = _result("model-first-token")["machine"]
    note = (
        f"{described['processor']} with {described['torch_isa']}, {described['threads']} threads, torch "
        f"{described['torch']}, fp32, {described['date'][:10]}; medians of calls made in turn, each checked first."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def _lines() -> Iterator[str]:
    for row in _result("model-first-token")["rows"]:
        yield (
            f"| SmolLM2-135M, first token of a prompt of {row['length']:,} | {row['patched_s']:.2f} s, dense "
            f"{row['dense_s']:.2f} s: {row['times']:.2f}x |"
        )
    for row in _result("demo")["rows"]:
        yield (
            f"| SmolLM2-135M, perplexity at {row['length']:,} tokens of text held out, {row['density']:.0%} of the "
            f"blocks | {row['patched_perplexity']:.2f}, dense {row['dense_perplexity']:.2f} |"
        )
    for row in json.loads((FOLDER / "results" / "learn.json").read_text(encoding="utf-8"))["rows"]:
        yield (
            f"| {_learned(row)} for SmolLM2-135M, {row['density']:.0%} of the blocks at {row['length']:,} tokens, two "
            f"texts held out | perplexity {row['ratio']:.3f}x dense; KL divergence {row['relative']:.2f} of equal "
            "windows' |"
        )
    pilots = map(read_pilot, (FOLDER / "results").glob("pilot-*.json"))
    yield from map(_hidden_numbers, sorted(pilots, key=lambda pilot: -pilot.columns[1].density))
    for row in _result("model-decode")["rows"]:
        yield (
            f"| SmolLM2-135M, decoding behind {row['length']:,} tokens | {row['patched_tokens_s']:.1f} tokens/s, dense "
            f"{row['dense_tokens_s']:.1f}: {row['times']:.2f}x |"
        )
    for row in _result("model-cache")["rows"]:
        yield (
            f"| SmolLM2-135M, {row['length']:,} tokens in a SurgeonCache | {row['kept_cache_mb']:.0f} MB of "
            f"{row['full_cache_mb']:.0f}, {row['surgeon_cache_tokens_s']:.1f} tokens/s, dense "
            f"{row['dense_tokens_s']:.1f}: {row['surgeon_cache_tokens_s'] / row['dense_tokens_s']:.2f}x |"
        )
    short = _result("model-short")["rows"]
    yield f"| SmolLM2-135M, prompts of 64 to 2,048 tokens, worst of them | {_least(short, 'times'):.2f}x |"
    peers = _result("prefill-peers")["rows"]
    sparse = [row for row in peers if row["density"] < 1]
    yield f"| prefill kernel beside FlexAttention, same blocks | {_range(sparse, 'times_flex')} |"
    yield f"| prefill kernel beside dense SDPA, times density | {_range(sparse, 'times_sdpa_x_density')} |"
    dense = [row for row in peers if row["density"] == 1]
    yield f"| prefill kernel at density 1 beside SDPA | {_range(dense, 'times_sdpa')} |"
    yield f"| prefill kernel's rate on its blocks, of torch's matrix product | {_range(peers, 'of_gemm', '')} |"
    long = [row for row in _result("decode")["rows"] if row["length"] >= 8192]
    for density, how in ((0.25, "at a quarter of the blocks"), (1.0, "densely")):
        rows = [row for row in long if row["density"] == density]
        yield f"| decoding {how}, 8,192 and 32,768 keys, beside SDPA | {_range(rows, 'times_sdpa')} |"


def _learned(row: Row) -> str:
    if row["method"] == "ultrametric":
        return "p-adic paths learned by descent"
    return "windows and clusters learned" if row["heads_with_a_cut"] else "windows learned"


def _hidden_numbers(pilot: Pilot) -> str:
    dense, patched, window = map(passkeys, pilot.columns)
    lengths = " and ".join(f"{length:,}" for length in sorted({cell.length for cell in pilot.columns[0].passkeys}))
    return (
        f"| SmolLM2-135M, numbers hidden in {lengths} tokens and found again, {pilot.columns[1].density:.0%} of the "
        f"blocks | {patched}, dense {dense}, equal windows {window} |"
    )


def _result(suite: str) -> Row:
    result: Row = json.loads((FOLDER / "results" / f"{suite}-native.json").read_text(encoding="utf-8"))
    return result


def _least(rows: list[Row], key: str) -> float:
    return float(min(row[key] for row in rows))


def _range(rows: list[Row], key: str, unit: str = "x") -> str:
    values = [row[key] for row in rows if key in row]
    return f"{min(values):.2f}{unit} to {max(values):.2f}{unit}"


if __name__ == "__main__":
    sys.exit(main())
