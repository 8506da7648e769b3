"""The figures of pilots, as sentences and rows of tables: what was asked, and what each model found."""

from collections.abc import Iterator

from committed import column_of, lengths_of, pilots_of, topology_of, visible
from inputs.checkpoints import QWEN_CODER_05B, SMOLLM2_135M, Checkpoint
from markdown import listed, table
from surgeon.compiler.learn.routing.routed import routed_heads
from surgeon.runtime.evaluate.pilot.pilot_file import Column, Pilot
from surgeon.runtime.evaluate.tasks.numbers import KEYS, SINGLE


def far_back() -> str:
    """The loss of a fixed pattern, as a sentence."""
    pilots = pilots_of()
    dense, tried = _far(pilots[0], column_of(pilots[0], "dense"))
    found = [f"{_far(pilot, column_of(pilot, name))[0]:.0f}" for name in ("patched", "pattern") for pilot in pilots]
    shares = listed([f"{column_of(pilot, 'patched').density:.0%}" for pilot in pilots])
    return (
        f"Of {tried} numbers hidden in the first half of {pilots[0].length:,} tokens, SmolLM2-135M found {dense:.0f} "
        f"when it read all blocks. With {shares} of the blocks it found {listed(found[: len(pilots)])}, and by the "
        f"pattern alone {listed(found[len(pilots) :])}. {_another_model()}\n"
    )


def _another_model() -> str:
    quarter, *others = pilots_of(checkpoint=QWEN_CODER_05B)
    dense, patched, alone = (column_of(quarter, name) for name in ("dense", "patched", "pattern"))
    keys, without = found_by(quarter, patched, KEYS), found_by(quarter, dense, KEYS)
    return (
        f"{QWEN_CODER_05B.title} found {found_by(quarter, patched)} numbers in {lengths_of(quarter, 'and')} tokens "
        f"with {visible(patched)} and {keys} of five keys; densely {found_by(quarter, dense)} and {without}, by "
        f"the pattern alone {found_by(quarter, alone)} and {found_by(quarter, alone, KEYS)}. "
    ) + " ".join(map(_also_found, others))


def _also_found(pilot: Pilot) -> str:
    dense, patched = (column_of(pilot, name) for name in ("dense", "patched"))
    asked = {question.task for question in pilot.questions}  # one of the two tasks, or both
    kinds = [(task, kind) for task, kind in ((SINGLE, "numbers"), (KEYS, "of five keys")) if task in asked]
    found = " and ".join(f"{found_by(pilot, patched, task)} {kind}" for task, kind in kinds)
    without = " and ".join(found_by(pilot, dense, task) for task, _ in kinds)
    return f"With {visible(patched)} it found {found} in {lengths_of(pilot, 'and')} tokens, densely {without}."


def ways_back() -> str:
    """The ways to read what is far back, one row each: a table for each model whose heads were routed."""
    return "\n".join(map(_ways_back, (SMOLLM2_135M, QWEN_CODER_05B)))


def _ways_back(checkpoint: Checkpoint) -> str:
    """The ways of a model, at the shortest length of its routed topologies and about their density."""
    every = pilots_of("pattern", checkpoint)
    length = min(pilot.length for pilot in every)
    routed = sorted((pilot for pilot in every if pilot.length == length), key=_routed_share)
    first, density = routed[0], column_of(routed[0], "patched").density
    same_length = (pilot for pilot in pilots_of("dense", checkpoint) if pilot.length == length)
    recalled = min(same_length, key=lambda pilot: abs(column_of(pilot, "patched").density - density))
    rows = [
        ("every block", first, column_of(first, "dense")),
        ('`recall="dense"`, windows learned for answers', recalled, column_of(recalled, "patched")),
        *(
            (f'`recall="pattern"`, {_routed_share(pilot):.0%} of the heads routed', pilot, column_of(pilot, "patched"))
            for pilot in routed
        ),
    ]
    if (equal := first.column("window")) is not None:
        rows.append(('`recall="pattern"`, equal windows', first, equal))
    return f"{checkpoint.title}, {length:,} tokens, {density:.0%} of the blocks:\n\n" + table(
        ("read", "dtype", "found", "of five", "perplexity", "first token", "decoding"),
        ((what, pilot.machine.dtype, *_way_back(pilot, column)) for what, pilot, column in rows),
    )


def _routed_share(pilot: Pilot) -> float:
    """The share of the heads that choose blocks by content."""
    topology = topology_of(column_of(pilot, "patched"))
    return routed_heads(topology) / sum(map(len, topology.layers))


def _way_back(pilot: Pilot, column: Column) -> tuple[str, ...]:
    dense = column_of(pilot, "dense")
    ratio = column.against_dense.continuation_ratio if column.against_dense else None
    return (
        found_by(pilot, column),
        found_by(pilot, column, KEYS),
        f"{ratio.value if ratio else 1:.3f}x",
        f"{dense.first_token.value / column.first_token.value:.2f}x",
        f"{column.decode.value / dense.decode.value:.2f}x",
    )


def piloted(model: str, pilot: Pilot) -> Iterator[tuple[str, str]]:
    """Rows of a pilot: the tasks and texts, and what came out."""
    dense, patched = (column_of(pilot, name) for name in ("dense", "patched"))
    beside = ((", equal windows", "window"), ("; by the pattern alone", "pattern"))  # a larger model's pilots lack some
    others = [(how, column) for how, name in beside if (column := pilot.column(name))]
    dtype = pilot.machine.dtype
    for task in (SINGLE, KEYS):
        if all(question.task != task for question in pilot.questions):
            continue
        found = "".join(f"{how} {found_by(pilot, column, task)}" for how, column in others)
        yield (
            f"{model}, {task}, hidden in {lengths_of(pilot, 'and')} tokens and found, {visible(patched)}, {dtype}",
            f"{found_by(pilot, patched, task)}, dense {found_by(pilot, dense, task)}{found}",
        )
    yield (
        f"{model}, perplexity after a prompt in that pilot, {visible(patched)}, {dtype}",
        f"{_continued(patched)} dense" + "".join(f"{how} {_continued(column)}" for how, column in others),
    )


def found_by(pilot: Pilot, column: Column, task: str = SINGLE) -> str:
    """The answers of a task that a model finds, of how many."""
    found, hidden = _hits(pilot, column, far=False, task=task)
    return f"{found:.0f} of {hidden}"


def _continued(column: Column) -> str:
    """The perplexity ratio of what follows a prompt, with its standard error."""
    assert column.against_dense is not None
    assert column.against_dense.continuation_ratio is not None
    ratio = column.against_dense.continuation_ratio
    return f"{ratio.value:.3f}x" + (f" ± {ratio.error:.3f}" if ratio.error else "")


def _far(pilot: Pilot, column: Column) -> tuple[float, int]:
    return _hits(pilot, column, far=True)


def _hits(pilot: Pilot, column: Column, far: bool, task: str = SINGLE) -> tuple[float, int]:
    """The numbers of a task that a model finds, of how many; `far` in the first half of the longest prompts only."""
    longest = max(each.length for each in pilot.questions)
    found = [
        score
        for each, score in zip(pilot.questions, column.scores, strict=True)
        if each.task == task and (not far or (each.length == longest and (each.depth or 0) <= 0.5))
    ]
    return sum(found), len(found)
