"""The measured figures as Markdown: every number stands in a file of `results/`."""

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_day.figures import first_rows
from inputs.checkpoints import CHECKPOINTS, QWEN_CODER_05B, SMOLLM2_135M, Checkpoint
from markdown import table
from surgeon.runtime.evaluate.continuation import CONTINUATION
from surgeon.runtime.evaluate.pilot_file import Column, Pilot, read_pilot
from surgeon.runtime.evaluate.tasks.numbers import KEYS, SINGLE

RESULTS = Path(__file__).parent / "results"
QUARTER = "smollm2-135m-25-answers"
"""The topology of the densest pilot."""
TITLES = {name: checkpoint.title for name, checkpoint in CHECKPOINTS.items()}
_PERPLEXITIES = ("dense_perplexity", "perplexity")

Row = Mapping[str, Any]


def first_figures() -> str:
    """The few figures that a reader sees first, each with its condition."""
    answers = _answers(2048)
    rows: list[tuple[str, ...]] = [_continuation(row) for row in (answers[0], answers[-1])]
    pilot = _pilots()[-1]
    dense, patched, alone = (_column(pilot, name) for name in ("dense", "patched", "pattern"))
    hidden = f"numbers hidden in {_lengths(pilot, 'or')} tokens and found, {_visible(patched)}"
    rows.append((hidden, _found(pilot, dense), _found(pilot, patched)))
    rows.append(('the same with `recall="pattern"`', _found(pilot, dense), _found(pilot, alone)))
    first = _suite("model-first-token")
    rows += [
        (
            f"first token of a prompt of {row['length']:,} tokens, {_share(_for_answers(row['topology']))}",
            f"{row['dense_s']:.2f} s",
            f"{row['patched_s']:.2f} s",
        )
        for row in {row["length"]: row for row in first["rows"]}.values()
    ]
    layers = _suite("prefill-peers")
    layer = layers["rows"][0]
    rows += [
        (
            f"attention of one layer (*), {layer['length']:,} tokens, {_share(layer)}",
            f"{layer['sdpa_ms']:.0f} ms",
            f"{layer['ours_ms']:.0f} ms",
        ),
    ]
    here = first["machine"]
    return (
        table((f"SmolLM2-135M, {here['threads']} CPU threads", "dense", "Surgeon"), rows)
        + f"\n{_processor(first)}, torch {here['torch']}, fp32, {here['date'][:10]}. Times are medians.\n"
        + f"(*) {_processor(layers)}, {layers['machine']['date'][:10]}; dense is PyTorch's SDPA.\n"
        + first_rows()
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
    one = pilots[QUARTER]
    asked = (_found(one, _column(one, "dense"), task) for task in (SINGLE, KEYS))
    rows = [("any", "100%", "–", "1.000x", "0", "100%", "1.00x", *asked)]
    for row in _read("answers")["rows"]:
        if row["model"] != SMOLLM2_135M.name:
            continue
        name, found, speed = row["topology"], ("–", "–"), speeds.get(row["topology"])
        if pilot := pilots.get(name):
            patched = _column(pilot, "patched")
            found = (_found(pilot, patched), _found(pilot, patched, KEYS))
        same = statistics.fmean(text["same_first"] for text in row["texts"])
        shape = (f"{row['length']:,}", f"{row['density']:.0%}", str(row["block_size"]))
        quality = (f"{row['ratio']:.3f}x", f"{_mean(row, 'divergence'):.4f}", f"{same:.0%}")
        rows.append((*shape, *quality, f"{speed:.2f}x" if speed else "–", *found))
    head = ("length", "visible", "block", "perplexity", "KL", "same next token", "first token", "found", "of five")
    short = _suite("model-short")
    times = ", ".join(f"{row['length']:,} tokens {row['times']:.2f}x" for row in short["rows"])
    return (
        table(head, rows)
        + f"\nFirst token of shorter prompts, by a pattern of 25%, on another machine ({_processor(short)}): {times}.\n"
    )


def far_back() -> str:
    """The loss of a fixed pattern, as a sentence."""
    pilots = _pilots()
    dense, tried = _far(pilots[0], _column(pilots[0], "dense"))
    found = [f"{_far(pilot, _column(pilot, name))[0]:.0f}" for name in ("patched", "pattern") for pilot in pilots]
    shares = _listed([f"{_column(pilot, 'patched').density:.0%}" for pilot in pilots])
    return (
        f"Of {tried} numbers hidden in the first half of {pilots[0].length:,} tokens, SmolLM2-135M found {dense:.0f} "
        f"when it read all blocks. With {shares} of the blocks it found {_listed(found[: len(pilots)])}, and by the "
        f"pattern alone {_listed(found[len(pilots) :])}. {_another_model()}\n"
    )


def _another_model() -> str:
    pilot = _pilots(checkpoint=QWEN_CODER_05B)[0]
    dense, patched, alone = (_column(pilot, name) for name in ("dense", "patched", "pattern"))
    keys, without = _found(pilot, patched, KEYS), _found(pilot, dense, KEYS)
    return (
        f"{QWEN_CODER_05B.title} found {_found(pilot, patched)} numbers in {_lengths(pilot, 'and')} tokens with "
        f"{_visible(patched)} and {keys} of five keys; densely {_found(pilot, dense)} and {without}, by the pattern "
        f"alone {_found(pilot, alone)} and {_found(pilot, alone, KEYS)}."
    )


def ways_back() -> str:
    """The ways to read what is far back, at about a quarter of the blocks, one row each."""
    (routed,) = _pilots("pattern")
    recalled = _pilots()[0]
    rows = (
        ("every block", routed, "dense"),
        ('`recall="dense"`, windows learned for answers', recalled, "patched"),
        ('`recall="pattern"`, a quarter of the heads routed', routed, "patched"),
        ('`recall="pattern"`, equal windows', routed, "window"),
    )
    return table(
        ("read", "found", "of five", "perplexity", "first token", "decoding"),
        ((what, *_way_back(pilot, _column(pilot, name))) for what, pilot, name in rows),
    )


def _way_back(pilot: Pilot, column: Column) -> tuple[str, ...]:
    dense = _column(pilot, "dense")
    ratio = column.against_dense.continuation_ratio if column.against_dense else None
    return (
        _found(pilot, column),
        _found(pilot, column, KEYS),
        f"{ratio.value if ratio else 1:.3f}x",
        f"{dense.first_token.value / column.first_token.value:.2f}x",
        f"{column.decode.value / dense.decode.value:.2f}x",
    )


def ways_to_run() -> str:
    """The first token in bf16, dense and patched, eager, compiled and traced, at each length."""
    result = _suite("model-ways")
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
        + f"\n{_processor(result)}, {machine['threads']} threads, torch {machine['torch']}, {machine['date'][:10]}, "
        f"load average {machine['load_average']:.1f}; medians of calls made in turn, CPU seconds in brackets. "
        f"Compiling the patched model took {compiling}.\n"
    )


def learning_cost() -> str:
    """The cost of learning, for each model that was measured and each way of learning."""
    costs, ways, answers = _read("learning-cost")["rows"], _read("learn")["rows"], _answers(2048)
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
        (
            _way(row) + (", for answers" if row in answers else ", for text"),
            f"{row['density']:.0%}",
            str(row["block_size"]),
            _processor(row),
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
    first, older, calls = _suite("model-first-token"), _suite("prefill-peers"), _suite("short-call")
    layer = _suite("vllm-prefill")
    machine = first["machine"]
    return (
        table(("measured", "Surgeon beside its peer"), _everything())
        + f"\n{_processor(first)}, {machine['threads']} threads, torch {machine['torch']}, fp32, pilots in bf16, "
        f"{machine['date'][:10]}; medians of calls made in turn. Windows for text, decoding, caches, short prompts and "
        f"kernels: {_processor(older)}, {older['machine']['date'][:10]}. One token's call: {_processor(calls)}, "
        f"{calls['machine']['date'][:10]}.\n"
        f"(**) Least CPU time of calls made in turn, {layer['machine']['threads']} thread, {_processor(layer)}, "
        f"{layer['machine']['date'][:10]}.\n"
    )


def _everything() -> Iterator[tuple[str, str]]:
    for row in _suite("model-first-token")["rows"]:
        yield (
            f"SmolLM2-135M, first token of a prompt of {row['length']:,}, {_share(_for_answers(row['topology']))}",
            f"{row['patched_s']:.2f} s, dense {row['dense_s']:.2f} s: {row['times']:.2f}x; by the pattern alone "
            f"{row['pattern_s']:.2f} s",
        )
    for row in _suite("demo")["rows"]:
        yield (
            f"SmolLM2-135M, perplexity after a prompt, {row['length']:,} tokens of unseen text, {_share(row)}",
            f"{row['patched_perplexity']:.2f}, dense {row['dense_perplexity']:.2f}",
        )
    for row in _read("answers")["rows"]:
        yield (
            f"windows learned for answers, {TITLES[row['model']]}, {_share(row)}: the {CONTINUATION} tokens after "
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
    for checkpoint in (SMOLLM2_135M, QWEN_CODER_05B):
        for pilot in _pilots(checkpoint=checkpoint):
            yield from _piloted(checkpoint.title, pilot)
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
    for row in _suite("short-call")["rows"]:
        yield (
            f"one token behind {row['keys']:,} keys, a layer's call in cold caches, {row['dtype']}",
            f"{_call(row, 'ours')}, through Python {_call(row, 'python')}, SDPA {_call(row, 'sdpa')}",
        )
    yield from _beside_vllm()
    yield from _served()


def _beside_vllm() -> Iterator[tuple[str, str]]:
    """The calls of one layer in a step of vLLM, by the least CPU time of each side."""
    dtypes = {"float32": "fp32", "bfloat16": "bf16"}
    for row in (*_suite("vllm-prefill")["rows"], *_suite("vllm-decode")["rows"]):
        length = f"{row['length']:,} tokens"
        step = (
            f"a prompt of {length}" if row["sequences"] == 1 else f"decoding {row['sequences']} sequences of {length}"
        )
        yield (
            f"attention of one layer of SmolLM2-135M on vLLM's pages, {step}, {_share(row)}, "
            f"{dtypes[row['dtype']]} (**)",
            f"{row['ours_cpu_minimum_ms']:.2f} ms, vLLM {row['vllm']}'s own kernels "
            f"{row['vllm_cpu_minimum_ms']:.2f} ms: {row['times_cpu_minimum']:.2f}x",
        )
    for row in _suite("vllm-write")["rows"]:
        if row["tokens"] > 1:
            yield (
                f"keys and values of {row['tokens']:,} tokens written into those pages, {dtypes[row['dtype']]} (**)",
                f"{row['ours_cpu_minimum_us'] / 1e3:.2f} ms, vLLM's own {row['vllm_cpu_minimum_us'] / 1e3:.2f} ms: "
                f"{row['times_cpu_minimum']:.2f}x",
            )


def _served() -> Iterator[tuple[str, str]]:
    """vLLM's servers: the first token of a prompt alone, requests at once, and the cache in use."""
    if not (RESULTS / "serving.json").is_file():
        return
    rows = _read("serving")["rows"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        dense, recalled, pattern = (row for row in rows if row["dtype"] == dtype)
        share, length = _share(_for_answers(dense["topology"])), f"{dense['prompt']:,} tokens"
        for what, name in (
            (f"first token of a prompt of {length}", "first"),
            (f"{dense['requests']} requests at once of up to {length}, which share prefixes", "requests"),
        ):
            clock, cpu = f"{name}_s", f"{name}_cpu_s"
            yield (
                f"vLLM's server of SmolLM2-135M, {what}, {share}, {dtype}",
                f"{recalled[clock]:.1f} s, vLLM alone {dense[clock]:.1f} s: {dense[clock] / recalled[clock]:.2f}x, of "
                f"CPU time {dense[cpu] / recalled[cpu]:.2f}x; by the pattern alone {pattern[clock]:.1f} s",
            )
        yield (
            f"cache that it has in use after {length} by the pattern alone, {dtype}",
            f"{pattern['cache_used'] / dense['cache_used']:.0%} of vLLM alone",
        )


def _piloted(model: str, pilot: Pilot) -> Iterator[tuple[str, str]]:
    dense, patched, alone = (_column(pilot, name) for name in ("dense", "patched", "pattern"))
    window = pilot.column("window")  # left out of a larger model's pilots
    for task in (SINGLE, KEYS):
        equal = f", equal windows {_found(pilot, window, task)}" if window else ""
        yield (
            f"{model}, {task}, hidden in {_lengths(pilot, 'and')} tokens and found, {_visible(patched)}",
            f"{_found(pilot, patched, task)}, dense {_found(pilot, dense, task)}{equal}; by the pattern alone "
            f"{_found(pilot, alone, task)}",
        )
    equal = f", equal windows {_continued(window)}" if window else ""
    yield (
        f"{model}, perplexity after a prompt in that pilot, {_visible(patched)}",
        f"{_continued(patched)} dense{equal}; by the pattern alone {_continued(alone)}",
    )


def _continued(column: Column) -> str:
    """The perplexity ratio of what follows a prompt, with its standard error."""
    assert column.against_dense is not None
    assert column.against_dense.continuation_ratio is not None
    ratio = column.against_dense.continuation_ratio
    return f"{ratio.value:.3f}x" + (f" ± {ratio.error:.3f}" if ratio.error else "")


def _read(name: str) -> Row:
    result: Row = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def _suite(name: str) -> Row:
    return _read(f"{name}-native")


def _pilots(recall: str = "dense", checkpoint: Checkpoint = SMOLLM2_135M) -> list[Pilot]:
    """A model's pilots under a recall, the densest first."""
    found = [read_pilot(file) for file in RESULTS.glob(f"pilot-{checkpoint.title.lower()}-*.json")]
    return sorted(
        (pilot for pilot in found if _column(pilot, "patched").recall == recall),
        key=lambda pilot: -_column(pilot, "patched").density,
    )


def _mean(row: Row, name: str) -> float:
    return statistics.fmean(text[name] for text in row["texts"])


def _answers(length: int) -> list[Row]:
    """The rows of SmolLM2-135M's windows of this length that were learned for answers, the densest first."""
    rows: list[Row] = _read("answers")["rows"]
    found = [row for row in rows if row["model"] == SMOLLM2_135M.name and not row["heads_with_a_cut"]]
    return sorted((row for row in found if row["length"] == length), key=lambda row: -float(row["density"]))


def _for_answers(topology: str) -> Row:
    rows: dict[str, Row] = {row["topology"]: row for row in _read("answers")["rows"]}
    return rows[topology]


def _visible(column: Column) -> str:
    return f"{column.density:.0%} of the blocks"


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


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
    if row["topology"].endswith("-routed"):
        return "windows of another topology and routed heads"
    if row["topology"].endswith("-converted"):
        return "windows of another topology converted to routes"
    return "windows and clusters" if row["heads_with_a_cut"] else "windows"


def _hits(pilot: Pilot, column: Column, far: bool, task: str = SINGLE) -> tuple[float, int]:
    """The numbers of a task that a model finds, of how many; `far` in the first half of the longest prompts only."""
    longest = max(each.length for each in pilot.questions)
    found = [
        score
        for each, score in zip(pilot.questions, column.scores, strict=True)
        if each.task == task and (not far or (each.length == longest and (each.depth or 0) <= 0.5))
    ]
    return sum(found), len(found)


def _far(pilot: Pilot, column: Column) -> tuple[float, int]:
    return _hits(pilot, column, far=True)


def _found(pilot: Pilot, column: Column, task: str = SINGLE) -> str:
    found, hidden = _hits(pilot, column, far=False, task=task)
    return f"{found:.0f} of {hidden}"


def _call(row: Row, name: str) -> str:
    return f"{row[f'{name}_us']:.0f} µs (fastest {row[f'{name}_min_us']:.0f})"


def _range(rows: Sequence[Row], key: str, unit: str = "x") -> str:
    values = [row[key] for row in rows if key in row]
    return f"{min(values):.2f}{unit} to {max(values):.2f}{unit}"
