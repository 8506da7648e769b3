"""The measured figures as Markdown: every number stands in a file of `results/`."""

import itertools
import re
import statistics
from collections.abc import Iterator, Sequence

from committed import (
    RESULTS,
    Row,
    answers_of,
    column_of,
    for_answers,
    lengths_of,
    pilots_of,
    processor,
    read,
    share,
    suite,
    visible,
)
from gpu_day.figures import first_rows
from inputs.checkpoints import CHECKPOINTS, QWEN_CODER_05B, SMOLLM2_135M
from markdown import listed, table
from pilot_figures import found_by, piloted
from routed_figures import routed
from surgeon.runtime.evaluate.continuation import CONTINUATION
from surgeon.runtime.evaluate.pilot.pilot_file import read_pilot
from surgeon.runtime.evaluate.tasks.numbers import KEYS, SINGLE
from vllm_figures import beside_vllm, served

QUARTER = "smollm2-135m-25-answers"
"""The topology of the densest pilot."""
TENTH = "smollm2-135m-10-answers"
"""The topology of the sparsest pilot."""
TITLES = {name: checkpoint.title for name, checkpoint in CHECKPOINTS.items()}
_PERPLEXITIES = ("dense_perplexity", "perplexity")


def first_figures() -> str:
    """The few figures that a reader sees first, each with its condition."""
    rows: list[tuple[str, ...]] = [_continuation(for_answers(name)) for name in (QUARTER, TENTH)]
    pilot = pilots_of()[-1]
    dense, patched, alone = (column_of(pilot, name) for name in ("dense", "patched", "pattern"))
    hidden = f"numbers hidden in {lengths_of(pilot, 'or')} tokens and found, {visible(patched)}"
    rows.append((hidden, found_by(pilot, dense), found_by(pilot, patched)))
    rows.append(('the same with `recall="pattern"`', found_by(pilot, dense), found_by(pilot, alone)))
    first = suite("model-first-token")
    rows += [
        (
            f"first token of a prompt of {row['length']:,} tokens, {share(for_answers(row['topology']))}",
            f"{row['dense_s']:.2f} s",
            f"{row['patched_s']:.2f} s",
        )
        for row in {row["length"]: row for row in first["rows"]}.values()
    ]
    layers = suite("prefill-peers")
    layer = layers["rows"][0]
    rows += [
        (
            f"attention of one layer (*), {layer['length']:,} tokens, {share(layer)}",
            f"{layer['sdpa_ms']:.0f} ms",
            f"{layer['ours_ms']:.0f} ms",
        ),
    ]
    here = first["machine"]
    return (
        table((f"SmolLM2-135M, {here['threads']} CPU threads", "dense", "Surgeon"), rows)
        + f"\n{processor(first)}, torch {here['torch']}, fp32, {here['date'][:10]}. Times are medians.\n"
        + f"(*) {processor(layers)}, {layers['machine']['date'][:10]}; dense is PyTorch's SDPA.\n"
        + first_rows()
    )


def _continuation(row: Row) -> tuple[str, ...]:
    """A topology that was learned for answers: the perplexity of the tokens that follow a prompt."""
    means = [statistics.geometric_mean(text[name] for text in row["texts"]) for name in _PERPLEXITIES]
    return (
        f"perplexity of the {CONTINUATION} tokens after a prompt of {row['length'] - CONTINUATION:,}, {share(row)}",
        *(f"{mean:.2f}" for mean in means),
    )


def choices() -> str:
    """The figures of each density, block and length, to choose by."""
    pilots = {file.stem.removeprefix("pilot-"): read_pilot(file) for file in RESULTS.glob("pilot-*.json")}
    speeds = {row["topology"]: row["times"] for row in suite("model-first-token")["rows"]}
    one = pilots[QUARTER]
    asked = (found_by(one, column_of(one, "dense"), task) for task in (SINGLE, KEYS))
    rows = [("any", "100%", "–", "1.000x", "0", "100%", "1.00x", *asked)]
    for row in read("answers")["rows"]:
        if row["model"] != SMOLLM2_135M.name or row["heads_with_a_cut"]:
            continue
        name, found, speed = row["topology"], ("–", "–"), speeds.get(row["topology"])
        if pilot := pilots.get(name):
            patched = column_of(pilot, "patched")
            found = (found_by(pilot, patched), found_by(pilot, patched, KEYS))
        same = statistics.fmean(text["same_first"] for text in row["texts"])
        shape = (f"{row['length']:,}", f"{row['density']:.0%}", str(row["block_size"]))
        quality = (f"{row['ratio']:.3f}x", f"{_mean(row, 'divergence'):.4f}", f"{same:.0%}")
        rows.append((*shape, *quality, f"{speed:.2f}x" if speed else "–", *found))
    head = ("length", "visible", "block", "perplexity", "KL", "same next token", "first token", "found", "of five")
    short = suite("model-short")
    times = ", ".join(
        f"{row['length']:,} tokens {row['times']:.2f}x" for row in short["rows"] if row["dtype"] == "float32"
    )
    return (
        table(head, rows)
        + f"\nFirst token of shorter prompts, fp32, by a pattern of 25% ({processor(short)}): {times}.\n"
    )


def ways_to_run() -> str:
    """The first token in bf16, dense and patched, eager, compiled and traced, at each length."""
    result = suite("model-ways")
    rows, machine = result["rows"], result["machine"]
    ways = {
        "dense": "dense",
        "dense_compiled": "dense, `torch.compile`",
        "patched": "patched",
        "patched_compiled": "patched, `torch.compile`",
        "traced": "`trace`, which computes all logits",
    }
    compiling = ", ".join(f"{row['patched_compiled_compile_s']:.0f} s" for row in rows)
    return (
        table(
            ("SmolLM2-135M, bf16, first token", *(f"{row['length']:,} tokens" for row in rows)),
            (
                (shown, *(f"{row[f'{way}_s']:.2f} s ({row[f'{way}_cpu_s']:.2f})" for row in rows))
                for way, shown in ways.items()
            ),
        )
        + f"\n{processor(result)}, {machine['threads']} threads, torch {machine['torch']}, {machine['date'][:10]}, "
        f"load average {machine['load_average']:.1f}; medians of calls made in turn, CPU seconds in brackets. "
        f"Compiling the patched model took {compiling}.\n"
    )


def learning_cost() -> str:
    """The cost of learning, for each model that was measured and each way of learning."""
    costs, ways, answers = read("learning-cost")["rows"], read("learn")["rows"], answers_of(2048)
    models = [
        (
            re.sub("-[0-9a-f]{12}$", "", row["model"]),  # a cached model's folder ends in a hash
            f"{row['parameters'] / 1e6:,.0f} million",
            processor(row),
            f"{row['cpu_seconds'] / 60:.0f} min",
            f"{row['cpu_seconds'] / row['prompt_cpu_seconds']:.0f}",
            f"{row['peak_mb'] / 1e3:.1f} GB",
            f"{row['peak_mb'] / 1e3 - row['parameters'] * 4 / 1e9:.1f} GB",
        )
        for row in costs
    ]
    learned = [
        (
            _way(row) + (", for answers" if row in answers else ", for text"),
            f"{row['density']:.0%}",
            str(row["block_size"]),
            processor(row),
            f"{row['learning_cpu_seconds'] / 60:.0f} min",
        )
        for row in (*answers, *ways)
        if row["length"] == 2048
    ]
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
        table(head, models)
        + "\n"
        + table(("learned for SmolLM2-135M", "visible", "block", "processor", "CPU time"), learned)
    )


def all_figures() -> str:
    """Every headline figure of the results."""
    first, layer = suite("model-first-token"), suite("vllm-prefill")
    machine = first["machine"]
    return (
        table(("measured", "Surgeon beside its peer"), _everything())
        + f"\n{processor(first)}, {machine['threads']} threads, torch {machine['torch']}, fp32, "
        f"{machine['date'][:10]}; medians of calls made in turn. {_elsewhere()}\n"
        f"(**) Least CPU time of calls made in turn, {layer['machine']['threads']} thread, {processor(layer)}, "
        f"{layer['machine']['date'][:10]}.\n"
    )


def _elsewhere() -> str:
    """The machines and days of figures that have their own, in words."""
    measured = {
        "windows for text": read("learn")["rows"][0],
        "decoding of the model": suite("model-decode"),
        "caches": suite("model-cache"),
        "short prompts": suite("model-short"),
        "routed heads": suite("routed-prefill"),
        "prefill kernels": suite("prefill-peers"),
        "decoding kernels": suite("decode"),
        "one token's call": suite("short-call"),
    }
    places: dict[str, list[str]] = {}
    for what, row in measured.items():
        places.setdefault(f"{processor(row)}, {row['machine']['date'][:10]}", []).append(what)
    words = (f"{listed(what) if len(what) > 1 else what[0]}: {place}." for place, what in places.items())
    return " ".join(f"{each[0].upper()}{each[1:]}" for each in words)


def _everything() -> Iterator[tuple[str, str]]:
    for row in suite("model-first-token")["rows"]:
        yield (
            f"SmolLM2-135M, first token of a prompt of {row['length']:,}, {share(for_answers(row['topology']))}",
            f"{row['patched_s']:.2f} s, dense {row['dense_s']:.2f} s: {row['times']:.2f}x; by the pattern alone "
            f"{row['pattern_s']:.2f} s",
        )
    for row in suite("demo")["rows"]:
        yield (
            f"SmolLM2-135M, perplexity after a prompt, {row['length']:,} tokens of unseen text, {share(row)}",
            f"{row['patched_perplexity']:.2f}, dense {row['dense_perplexity']:.2f}",
        )
    for row in read("answers")["rows"]:
        yield (
            f"{_way(row)} learned for answers, {TITLES[row['model']]}, {share(row)} of {row['block_size']} tokens: the "
            f"{CONTINUATION} tokens after a prompt of {row['length'] - CONTINUATION:,}, two unseen texts",
            f"perplexity {row['ratio']:.3f}x dense; KL divergence {_mean(row, 'divergence'):.4f}, "
            f"equal windows {_mean(row, 'windows_divergence'):.4f}",
        )
    for row in read("learn")["rows"]:
        yield (
            f"{_way(row)} learned for {TITLES[row['model']]}, {row['density']:.0%} of the blocks at {row['length']:,} "
            "tokens, two unseen texts",
            f"perplexity {row['ratio']:.3f}x dense; KL divergence {row['relative']:.2f} of that of equal windows",
        )
    for checkpoint in (SMOLLM2_135M, QWEN_CODER_05B):
        for pilot in pilots_of(checkpoint=checkpoint):
            yield from piloted(checkpoint.title, pilot)
    for row in read("token-by-token")["rows"]:
        for task, found in row["tasks"].items():
            yield (
                f"{TITLES[row['model']]}, {task}, hidden in {_lengths(row)} tokens and asked for token by token, routed"
                f" heads, {share(row)}",
                f"{found['by_token']:.0f} of {found['questions']}, in one call {found['in_one_call']:.0f}",
            )
    for row in suite("model-decode")["rows"]:
        yield (
            f"SmolLM2-135M, decoding after {row['length']:,} tokens, {row['dtype']}",
            f"{row['patched_tokens_s']:.1f} tokens/s, dense {row['dense_tokens_s']:.1f}: {row['times']:.2f}x",
        )
    for row in suite("model-cache")["rows"]:
        yield (
            f"SmolLM2-135M, {row['length']:,} tokens in a SurgeonCache",
            f"{row['kept_cache_mb']:.0f} MB of {row['full_cache_mb']:.0f}, {row['surgeon_cache_tokens_s']:.1f} tokens/s"
            f", dense {row['dense_tokens_s']:.1f}: {row['surgeon_cache_tokens_s'] / row['dense_tokens_s']:.2f}x",
        )
    for dtype, short in itertools.groupby(suite("model-short")["rows"], lambda row: row["dtype"]):
        worst = min(row["times"] for row in short)
        yield f"SmolLM2-135M, first token of prompts of 64 to 2,048 tokens, {dtype}, worst of them", f"{worst:.2f}x"
    yield from routed()
    peers = suite("prefill-peers")["rows"]
    sparse = [row for row in peers if row["density"] < 1]
    yield "prefill kernel beside FlexAttention, same blocks", _range(sparse, "times_flex")
    yield "prefill kernel beside dense SDPA, times density", _range(sparse, "times_sdpa_x_density")
    yield "prefill kernel at density 1 beside SDPA", _range([row for row in peers if row["density"] == 1], "times_sdpa")
    yield "prefill kernel's rate on its blocks, of torch's matrix product", _range(peers, "of_gemm", "")
    long = [row for row in suite("decode")["rows"] if row["length"] >= 8192]
    for dtype, (density, how) in itertools.product(
        ("float32", "bfloat16"), ((0.25, "at a quarter of the blocks"), (1.0, "densely"))
    ):
        rows = [row for row in long if row["density"] == density and row["dtype"] == dtype]
        folded = f"where SDPA's queries are a group's heads {_range(rows, 'times_folded')}"
        yield (
            f"decoding kernel {how}, 8,192 and 32,768 keys, {dtype}, beside SDPA",
            f"{_range(rows, 'times_sdpa')}; {folded}",
        )
    for row in suite("short-call")["rows"]:
        yield (
            f"one token behind {row['keys']:,} keys, a layer's call in cold caches, {row['dtype']}",
            f"{_call(row, 'ours')}, through Python {_call(row, 'python')}, SDPA {_call(row, 'sdpa')}; torch alone "
            f"makes an empty result in {_call(row, 'empty')} and reads as many bytes in {_call(row, 'read')}",
        )
    yield from beside_vllm()
    yield from served()


def _mean(row: Row, name: str) -> float:
    return statistics.fmean(text[name] for text in row["texts"])


def _lengths(row: Row) -> str:
    return " and ".join(f"{length:,}" for length in row["lengths"])


def _way(row: Row) -> str:
    if row["method"] == "ultrametric":
        return "p-adic paths by descent"
    routes = {
        "-routed": "windows of another topology, longer where heads retrieve, converted to routes",
        "-converted": "windows of another topology converted to routes",
    }
    for part, what in routes.items():
        if part in row["topology"]:
            return what
    return "windows and clusters" if row["heads_with_a_cut"] else "windows"


def _call(row: Row, name: str) -> str:
    return f"{row[f'{name}_us']:.0f} µs (fastest {row[f'{name}_min_us']:.0f})"


def _range(rows: Sequence[Row], key: str, unit: str = "x") -> str:
    values = [row[key] for row in rows if key in row]
    return f"{min(values):.2f}{unit} to {max(values):.2f}{unit}"
