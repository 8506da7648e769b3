"""The comparison with other engines, as Markdown."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown import table

RESULTS = Path(__file__).parents[1] / "results"

Result = Mapping[str, Any]


def peers() -> str:
    """The committed comparisons."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.glob("peers-*.json")]
    return peers_table(sorted(found, key=lambda result: int(result["length"])))


def peers_table(results: Sequence[Result]) -> str:
    """The peers with their times at each length, who is left out there and why, the versions and the machine."""
    lengths = [f"{result['length']:,}" for result in results]
    named = {name: peer for result in results for name, peer in result["peers"].items()}
    head = (
        "engine",
        "linear layers",
        *(f"{what}, {length}" for what in ("first token", "tokens/s") for length in lengths),
    )
    return (
        table((*head, "found"), (_cells(name, peer, results) for name, peer in named.items()))
        + f"\n{'; '.join(dict.fromkeys(map(_where, results)))}. In brackets: CPU seconds of the first token, CPU "
        "milliseconds of a later one.\n"
        + "".join(dict.fromkeys(line for result in results for line in _left_out(result)))
    )


def _cells(name: str, peer: Result, results: Sequence[Result]) -> list[str]:
    rows = [result["peers"].get(name) for result in results]
    first = [f"{row['first_s']:.2f} s ({row['first_cpu_s']:.2f})" if row else "–" for row in rows]
    later = [f"{row['tokens_s']:.1f} ({1000 * row['token_cpu_s']:.0f})" if row else "–" for row in rows]
    right, asked = (sum(row[key] for row in rows if row) for key in ("right", "asked"))
    return [peer["title"], peer["linear"], *first, *later, f"{right} of {asked}"]


def _where(result: Result) -> str:
    here, versions = result["machine"], {pair for peer in result["peers"].values() for pair in peer["versions"].items()}
    told = ", ".join(f"{library} {version}" for library, version in sorted(versions))
    return (
        f"{here['processor'].replace('(R)', '')}, {here['torch_isa']}, {here['threads']} threads, {told}, "
        f"{here['date'][:10]}, load average {here['load_average']:.1f}, {_rounds(result['rounds'])}"
    )


def _rounds(number: int) -> str:
    return "one round" if number == 1 else f"medians of {number} rounds"


def _left_out(result: Result) -> Iterator[str]:
    return (f"Left out: {name} ({why}).\n" for name, why in result["left_out"].items())
