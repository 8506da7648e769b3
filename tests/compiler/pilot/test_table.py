"""The table of a pilot: every figure once, comparisons with the dense model below the figures they compare."""

from surgeon.compiler.pilot.table import pilot_table, refusal, retrieval_table, verdict
from surgeon.runtime.evaluate.estimates import Estimate
from surgeon.runtime.evaluate.pilot.figures import FIGURES, AgainstDense
from surgeon.runtime.evaluate.pilot.pilot_file import Column, Pilot, PilotMachine, Threshold
from surgeon.runtime.evaluate.retrieval import AskedQuestion, DroppedTask

ROWS = {
    "visible pairs of blocks": ("100.0%", "37.5%", "37.5%"),
    "continuation: perplexity": ("15.250 ± 0.500", "15.250 ± 0.500", "–"),
    "continuation: perplexity, times dense": ("–", "1.0000", "–"),
    "continuation: KL from dense, nats a token": ("–", "2.00000", "–"),
    "continuation: most likely next token agrees": ("–", "300.00%", "–"),
    "retrieval: single number, of 2": ("100% ± 0%", "50% ± 50%", "0% ± 0%"),
    "retrieval: several keys, of 3": ("67% ± 22%", "33% ± 22%", "0% ± 0%"),
    "retrieval, times dense": ("–", "4.00", "–"),
    "retrieval, times dense, worst task": ("–", "5.00 (several keys)", "–"),
    "prompt: perplexity": ("19.750 ± 1.500", "19.750 ± 1.500", "19.750 ± 1.500"),
    "prompt: perplexity, times dense": ("–", "6.0000", "–"),
    "prompt: KL from dense, nats a token": ("–", "7.00000", "–"),
    "prompt: KL in the last quarter": ("–", "8.00000", "–"),
    "prompt: most likely next token agrees": ("–", "900.00%", "–"),
    "first token, s": ("0.250 ± 0.062", "0.250 ± 0.062", "0.250 ± 0.062"),
    "first token, times as fast": ("–", "10.00", "–"),
    "decoding, tokens/s": ("12.5", "12.5", "12.5"),
    "decoding, times as fast": ("–", "11.00", "–"),
    "peak memory, MB": ("2.0", "2.0", "2.0"),
    "cache kept, MB": ("–", "–", "–"),
    "weights": ("unchanged", "unchanged", "unchanged"),
}
ASKED = tuple(
    AskedQuestion(task, length, None, asked, prompt)
    for task, length, asked, prompt in (
        ("single number", 32, "end", 0),
        ("single number", 64, "later", 1),
        ("several keys", 64, "later", 2),
        ("several keys", 64, "later", 2),
        ("several keys", 64, "end", 3),
    )
)


def column(name: str, recall: str | None, beside: AgainstDense | None, scores: tuple[float, ...]) -> Column:
    return Column(
        name=name,
        topology_sha256=None,
        recall=recall,
        dense_rows=None,
        density=0.375 if recall else 1.0,
        losses=(3.0,),
        perplexity=Estimate(19.75, 1.5),
        continuation_perplexity=None if name == "pattern" else Estimate(15.25, 0.5),
        against_dense=beside,
        scores=scores,
        first_token=Estimate(0.25, 0.0625),
        decode=Estimate(12.5, None),
        peak_bytes=2_000_000,
        kept_cache_bytes=None,
        weights_sha256="0" * 64,
    )


def pilot(*thresholds: Threshold, questions: tuple[AskedQuestion, ...] = ASKED, weights: str = "0" * 64) -> Pilot:
    figures = {name: Estimate(float(index), None) for index, name in enumerate(FIGURES, start=1)}
    asked = len(questions)
    columns = (
        column("dense", None, None, (1, 1, 1, 0, 1)[:asked]),
        column("patched", "dense", AgainstDense(**figures, worst_task="several keys"), (1, 0, 1, 0, 0)[:asked]),
        column("pattern", "pattern", None, (0, 0, 0, 0, 0)[:asked]),
    )
    machine = PilotMachine("a processor", "cpu", "fp32", 2, "2", "5", "2026-01-01")
    dropped = (DroppedTask("common words", 4, 0.25), DroppedTask("frequent words", 4, 0.0))
    return Pilot("a model", weights, "2" * 64, 64, (), machine, questions, dropped, columns, thresholds, 12.0)


def test_every_figure_has_its_row() -> None:
    table = pilot_table(pilot())
    assert table.heads == ("dense", "patched, recall dense", "pattern")
    assert {row.name: row.cells for row in table.rows} == ROWS
    assert [row.name for row in table.rows] == list(ROWS)


def test_retrieval_is_shown_by_task_length_and_place_of_the_question() -> None:
    assert [(row.name, row.cells) for row in retrieval_table(pilot()).rows] == [
        ("single number, 32 tokens, asked at the end", ("100%", "100%", "0%")),
        ("single number, 64 tokens, asked later", ("100%", "0%", "0%")),
        ("several keys, 64 tokens, asked at the end", ("100%", "0%", "0%")),
        ("several keys, 64 tokens, asked later", ("50%", "50%", "0%")),
    ]


def test_a_verdict_names_what_it_left_out() -> None:
    met = Threshold("perplexity", "at most", 1.02, 1.01, True)
    dropped = "dropped, since the dense model scores less than 50%: common words (25% of 4), frequent words (0% of 4)"
    assert verdict(pilot(met)) == ("met: perplexity 1.0100, to be at most 1.02", dropped)
    assert verdict(pilot()) == ("no threshold was given", dropped)
    assert verdict(pilot(questions=()))[-1].startswith("retrieval was not judged")


def test_a_refusal_gives_every_reason_on_one_line() -> None:
    met = Threshold("perplexity", "at most", 1.02, 1.01, True)
    lost = Threshold("retrieval of keys", "at least", 0.9, 0.625, False)
    slow = Threshold("speed-up", "at least", 1.5, 1.25, False)
    assert refusal(pilot(met)) is None
    assert refusal(pilot(met, lost, slow)) == (
        "refused: retrieval of keys 0.625 instead of at least 0.9; speed-up 1.25 instead of at least 1.5"
    )
    assert refusal(pilot(met, weights="1" * 64)) == "refused: the weights have changed"
