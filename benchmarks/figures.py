"""The measured figures as Markdown: every number stands in a file of `results/`."""

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.runtime.evaluate.continuation import CONTINUATION
from surgeon.runtime.evaluate.pilot_file import Column, Pilot, read_pilot
from surgeon.runtime.evaluate.tasks.numbers import SINGLE

RESULTS = Path(__file__).parent / "results"
QUARTER = "smollm2-135m-25"
_PERPLEXITIES = ("dense_perplexity", "perplexity")

Row = Mapping[str, Any]


def first_figures() -> str:
    """The few figures that a reader sees first, each with its condition."""
    rows: list[tuple[str, ...]] = [_continuation(row) for row in _read("answers")["rows"]]
    rows += [
        (
            f"first token of a prompt of {row['length']:,} tokens, {_share(_learned(row['topology']))}",
            f"{row['dense_s']:.2f} s",
            f"{row['patched_s']:.2f} s",
        )
        for row in _suite("model-first-token")["rows"]
    ]
    pilot = read_pilot(RESULTS / f"pilot-{QUARTER}.json")
    dense, patched = (_column(pilot, name) for name in ("dense", "patched"))
    learned = _learned(QUARTER)
    hidden = f"numbers hidden in {_lengths(pilot, 'or')} tokens and found, {_share(learned)}"
    rows += [
        (hidden, _found(pilot, dense), _found(pilot, patched)),
        (f"of these, in the first half of {pilot.length:,} tokens", _far_back(pilot, dense), _far_back(pilot, patched)),
    ]
    layer, cache = _suite("prefill-peers")["rows"][0], _suite("model-cache")["rows"][0]
    rows += [
        (
            f"attention of one layer (dense: PyTorch's SDPA), {layer['length']:,} tokens, {_share(layer)}",
            f"{layer['sdpa_ms']:.0f} ms",
            f"{layer['ours_ms']:.0f} ms",
        ),
        (
            f"keys and values kept after {cache['length']:,} tokens, {_share(_learned(cache['topology']))}",
            f"{cache['full_cache_mb']:.0f} MB",
            f"{cache['kept_cache_mb']:.0f} MB",
        ),
    ]
    machine = _suite("model-first-token")["machine"]
    return (
        _table((f"SmolLM2-135M, {machine['threads']} CPU threads", "dense", "Surgeon"), rows)
        + f"\n{machine['processor']}, {machine['torch_isa']}, torch {machine['torch']}, fp32, "
        f'{machine["date"][:10]}. Times are medians.\nThe first row is with `recall="dense"`, the others with '
        '`recall="pattern"`.\n'
    )


def _continuation(row: Row) -> tuple[str, ...]:
    """A topology that was learned for answers: the perplexity of the tokens that follow a prompt."""
    means = [statistics.geometric_mean(text[name] for text in row["texts"]) for name in _PERPLEXITIES]
    return (
        f"perplexity of the {CONTINUATION} tokens after a prompt of {row['length'] - CONTINUATION:,}, {_share(row)}",
        *(f"{mean:.2f}" for mean in means),
    )


def choices() -> str:
    """The figures of each density, block and length, to choose by."""
    pilots = {file.stem.removeprefix("pilot-"): read_pilot(file) for file in RESULTS.glob("pilot-*.json")}
    speeds = {row["topology"]: row["times"] for row in _suite("model-first-token")["rows"]}
    caches = {row["topology"]: row["kept_cache_mb"] / row["full_cache_mb"] for row in _suite("model-cache")["rows"]}
    quarter, dense = pilots[QUARTER], _column(pilots[QUARTER], "dense")
    hidden = (_found(quarter, dense), _far_back(quarter, dense))
    rows = [("any", "100%", "–", "1.000x", "100%", "1.00x", "100%", *hidden)]
    for row in _windows():
        name = row["topology"]
        speed, kept, found, far = speeds.get(name), caches.get(name), "–", "–"
        if pilot := pilots.get(name):
            patched = _column(pilot, "patched")
            found, far = _found(pilot, patched), _far_back(pilot, patched)
            speed = patched.against_dense.first_token_speedup.value if patched.against_dense else None
            kept = (patched.kept_cache_bytes or 0) / (_column(pilot, "dense").kept_cache_bytes or 1)
        same = statistics.fmean(text["same_first"] for text in row["texts"])
        shape = (f"{row['length']:,}", f"{row['density']:.0%}", str(row["block_size"]))
        gained = (f"{speed:.2f}x" if speed else "–", f"{kept:.0%}" if kept else "–")
        rows.append((*shape, f"{row['ratio']:.3f}x", f"{same:.0%}", *gained, found, far))
    quality, speed_and_memory = ("perplexity", "same next token"), ("first token", "cache")
    head = ("length", "visible", "block", *quality, *speed_and_memory, "found", "found far back")
    short = ", ".join(f"{row['length']:,} tokens {row['times']:.2f}x" for row in _suite("model-short")["rows"])
    return _table(head, rows) + f"\nFirst token with the 25% topology and shorter prompts: {short}.\n"


def far_back() -> str:
    """The loss of a fixed pattern, as a sentence."""
    pilots = _pilots()
    dense, tried = _far(pilots[0], _column(pilots[0], "dense"))
    patched = [(pilot, _column(pilot, "patched")) for pilot in pilots]
    found = [f"{_far(pilot, column)[0]:.0f} with {column.density:.0%}" for pilot, column in patched]
    return (
        f"Of {tried} numbers hidden in the first half of {pilots[0].length:,} tokens, SmolLM2-135M by the pattern "
        f"alone found {dense:.0f} when it read all blocks, {', '.join(found[:-1])} and {found[-1]}.\n"
    )


def learning_cost() -> str:
    """The cost of learning, for each model that was measured and each way of learning."""
    costs, ways = _read("learning-cost")["rows"], _read("learn")["rows"]
    models = [
        (
            re.sub("-[0-9a-f]{12}$", "", row["model"]),  # a cached model's folder ends in a hash
            f"{row['parameters'] / 1e6:,.0f} million",
            _processor(row),
            f"{row['cpu_seconds'] / 60:.0f} min",
            f"{row['cpu_seconds'] / row['prompt_cpu_seconds']:.0f}",
            f"{row['peak_mb'] / 1e3:.1f} GB",
            f"{row['peak_mb'] / 1e3 - row['parameters'] * 4 / 1e9:.1f} GB",
        )
        for row in costs
    ]
    learned = [
        (_way(row), f"{row['density']:.0%}", str(row["block_size"]), f"{row['learning_cpu_seconds'] / 60:.0f} min")
        for row in ways
        if row["length"] == 2048
    ]
    prompt = _suite("model-first-token")["rows"][0]["dense_s"] * _suite("model-first-token")["machine"]["threads"]
    prompts = _learned(QUARTER)["learning_cpu_seconds"] / prompt
    head = (
        "model",
        "parameters",
        "processor",
        "CPU time",
        "as many dense prompts",
        "peak memory",
        "of it beyond the weights",
    )
    return (
        _table(head, models)
        + "\n"
        + _table(("learned for SmolLM2-135M", "visible", "block", "CPU time"), learned)
        + f"\n{_processor(ways[0])}; the windows at 25% took as much as {prompts:.0f} dense prompts there.\n"
    )


def all_figures() -> str:
    """Every headline figure of the results."""
    machine = _suite("model-first-token")["machine"]
    return (
        _table(("measured", "Surgeon beside its peer"), _everything())
        + f"\n{machine['processor']} with {machine['torch_isa']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, fp32, {machine['date'][:10]}; medians of calls made in turn.\n"
    )


def _everything() -> Iterator[tuple[str, str]]:
    for row in _suite("model-first-token")["rows"]:
        yield (
            f"SmolLM2-135M, first token of a prompt of {row['length']:,}",
            f"{row['patched_s']:.2f} s, dense {row['dense_s']:.2f} s: {row['times']:.2f}x",
        )
    for row in _suite("demo")["rows"]:
        yield (
            f"SmolLM2-135M, perplexity at {row['length']:,} tokens of unseen text, {row['density']:.0%} of the blocks",
            f"{row['patched_perplexity']:.2f}, dense {row['dense_perplexity']:.2f}",
        )
    for row in _read("answers")["rows"]:
        yield (
            f"windows learned for answers, SmolLM2-135M, recall dense, {_share(row)}: the {CONTINUATION} tokens after "
            f"a prompt of {row['length'] - CONTINUATION:,}, two unseen texts",
            f"perplexity {row['ratio']:.3f}x dense; KL divergence {_mean(row, 'divergence'):.4f}, "
            f"equal windows {_mean(row, 'windows_divergence'):.4f}",
        )
    for row in _read("learn")["rows"]:
        yield (
            f"{_way(row)} learned for SmolLM2-135M, {row['density']:.0%} of the blocks at {row['length']:,} tokens, "
            "two unseen texts",
            f"perplexity {row['ratio']:.3f}x dense; KL divergence {row['relative']:.2f} of that of equal windows",
        )
    for pilot in _pilots():
        dense, patched, window = (_column(pilot, name) for name in ("dense", "patched", "window"))
        yield (
            f"SmolLM2-135M, numbers hidden in {_lengths(pilot, 'and')} tokens and found again, "
            f"{patched.density:.0%} of the blocks",
            f"{_found(pilot, patched)}, dense {_found(pilot, dense)}, equal windows {_found(pilot, window)}",
        )
        quality = [column.against_dense.perplexity_ratio for column in (patched, window) if column.against_dense]
        ours, theirs = (f"{found.value:.3f}x" + (f" ± {found.error:.3f}" if found.error else "") for found in quality)
        yield (
            f"SmolLM2-135M, perplexity in that pilot, {patched.density:.0%} of the blocks",
            f"{ours} dense, equal windows {theirs}",
        )
    for row in _suite("model-decode")["rows"]:
        yield (
            f"SmolLM2-135M, decoding after {row['length']:,} tokens",
            f"{row['patched_tokens_s']:.1f} tokens/s, dense {row['dense_tokens_s']:.1f}: {row['times']:.2f}x",
        )
    for row in _suite("model-cache")["rows"]:
        yield (
            f"SmolLM2-135M, {row['length']:,} tokens in a SurgeonCache",
            f"{row['kept_cache_mb']:.0f} MB of {row['full_cache_mb']:.0f}, {row['surgeon_cache_tokens_s']:.1f} tokens/s"
            f", dense {row['dense_tokens_s']:.1f}: {row['surgeon_cache_tokens_s'] / row['dense_tokens_s']:.2f}x",
        )
    short = [row["times"] for row in _suite("model-short")["rows"]]
    yield "SmolLM2-135M, first token of prompts of 64 to 2,048 tokens, worst of them", f"{min(short):.2f}x"
    peers = _suite("prefill-peers")["rows"]
    sparse = [row for row in peers if row["density"] < 1]
    yield "prefill kernel beside FlexAttention, same blocks", _range(sparse, "times_flex")
    yield "prefill kernel beside dense SDPA, times density", _range(sparse, "times_sdpa_x_density")
    yield "prefill kernel at density 1 beside SDPA", _range([row for row in peers if row["density"] == 1], "times_sdpa")
    yield "prefill kernel's rate on its blocks, of torch's matrix product", _range(peers, "of_gemm", "")
    long = [row for row in _suite("decode")["rows"] if row["length"] >= 8192]
    for density, how in ((0.25, "at a quarter of the blocks"), (1.0, "densely")):
        rows = [row for row in long if row["density"] == density]
        yield f"decoding {how}, 8,192 and 32,768 keys, beside SDPA", _range(rows, "times_sdpa")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *others = (f"| {' | '.join(cells)} |\n" for cells in (head, *rows))
    return "".join([first, "|" + "---|" * len(head) + "\n", *others])


def _read(name: str) -> Row:
    result: Row = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def _suite(name: str) -> Row:
    return _read(f"{name}-native")


def _pilots() -> list[Pilot]:
    """The densest first."""
    return sorted(map(read_pilot, RESULTS.glob("pilot-*.json")), key=lambda pilot: -_column(pilot, "patched").density)


def _learned(topology: str) -> Row:
    rows: dict[str, Row] = {row["topology"]: row for row in _read("learn")["rows"]}
    return rows[topology]


def _mean(row: Row, name: str) -> float:
    return statistics.fmean(text[name] for text in row["texts"])


def _windows() -> list[Row]:
    return [row for row in _read("learn")["rows"] if row["method"] == "budget" and not row["heads_with_a_cut"]]


def _share(row: Row) -> str:
    return f"{row['density']:.0%} of the blocks"


def _column(pilot: Pilot, name: str) -> Column:
    column = pilot.column(name)
    assert column is not None, f"a committed pilot has a column {name}"
    return column


def _lengths(pilot: Pilot, word: str) -> str:
    """The lengths of the prompts that numbers are hidden in."""
    return f" {word} ".join(f"{length:,}" for length in sorted({each.length for each in pilot.questions}))


def _processor(row: Row) -> str:
    return f"{row['machine']['processor'].replace('(R)', '')}, {row['machine']['torch_isa']}"


def _way(row: Row) -> str:
    if row["method"] == "ultrametric":
        return "p-adic paths by descent"
    return "windows and clusters" if row["heads_with_a_cut"] else "windows"


def _hits(pilot: Pilot, column: Column, far: bool) -> tuple[float, int]:
    """The single numbers that a model finds, of how many; `far` ones in the first half of the longest prompts only."""
    longest = max(each.length for each in pilot.questions)
    found = [
        score
        for each, score in zip(pilot.questions, column.scores, strict=True)
        if each.task == SINGLE and (not far or (each.length == longest and (each.depth or 0) <= 0.5))
    ]
    return sum(found), len(found)


def _far(pilot: Pilot, column: Column) -> tuple[float, int]:
    return _hits(pilot, column, far=True)


def _found(pilot: Pilot, column: Column) -> str:
    found, hidden = _hits(pilot, column, far=False)
    return f"{found:.0f} of {hidden}"


def _far_back(pilot: Pilot, column: Column) -> str:
    found, hidden = _far(pilot, column)
    return f"{found:.0f} of {hidden}"


def _range(rows: Sequence[Row], key: str, unit: str = "x") -> str:
    values = [row[key] for row in rows if key in row]
    return f"{min(values):.2f}{unit} to {max(values):.2f}{unit}"
