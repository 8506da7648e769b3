"""The table of the comparison: every time at its length, and every engine that is left out with its reason."""

from typing import Any

from workers.figures import peers_table


def peer(title: str, versions: dict[str, str], first: float, right: int) -> dict[str, Any]:
    return {
        "title": title,
        "linear": "fp32",
        "versions": versions,
        "right": right,
        "asked": 4,
        "first_s": first,
        "first_min_s": first / 2,
        "first_cpu_s": 2 * first,
        "tokens_s": 10 / first,
        "tokens_max_s": 20 / first,
        "token_cpu_s": first / 100,
    }


def result(length: int, left_out: dict[str, str], **peers: dict[str, Any]) -> dict[str, Any]:
    machine: dict[str, Any] = {"processor": "A(R) B", "torch_isa": "AVX512", "threads": 2, "load_average": 1.96}
    machine |= {"date": "2026-11-29T01:02:03"}
    return {"machine": machine, "length": length, "rounds": 3, "peers": peers, "left_out": left_out}


def test_the_table() -> None:
    one, two = {"torch": "2", "one": "1.5"}, {"torch": "2"}
    short = result(
        100, {"three": "No module named 'three'"}, one=peer("One", one, 1.0, 4), two=peer("Two", two, 2.0, 3)
    )
    long = result(2000, {"three": "No module named 'three'", "two": "it ended"}, one=peer("One", one, 20.0, 2))
    where = "A B, AVX512, 2 threads, one 1.5, torch 2, 2026-11-29, load average 2.0, medians of 3 rounds"
    assert peers_table([short, long]).splitlines() == [
        "| engine | linear layers | first token, 100 | first token, 2,000 | tokens/s, 100 | tokens/s, 2,000 | found |",
        "|---|---|---|---|---|---|---|",
        "| One | fp32 | 1.00 s (2.00) | 20.00 s (40.00) | 10.0 (10) | 0.5 (200) | 6 of 8 |",
        "| Two | fp32 | 2.00 s (4.00) | – | 5.0 (20) | – | 3 of 4 |",
        "",
        f"{where}. In brackets: CPU seconds of the first token, CPU milliseconds of a later one.",
        "Left out: three (No module named 'three').",
        "Left out: two (it ended).",
    ]
