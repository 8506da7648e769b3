"""The table of a pilot: every figure once, comparisons with the dense model below the figures they compare."""

from surgeon.compiler.pilot.table import pilot_table
from surgeon.runtime.evaluate.estimates import Estimate
from surgeon.runtime.evaluate.figures import FIGURES, AgainstDense
from surgeon.runtime.evaluate.pilot_file import Column, Pilot, PilotMachine

ROWS = {
    "visible pairs of blocks": ("100.0%", "37.5%"),
    "perplexity": ("19.750 ± 1.500", "19.750 ± 1.500"),
    "perplexity, times dense": ("–", "1.0000"),
    "KL from dense, nats a token": ("–", "2.00000"),
    "KL in the last quarter": ("–", "3.00000"),
    "most likely next token agrees": ("–", "400.00%"),
    "passkeys found": ("–", "–"),
    "first token, s": ("0.250 ± 0.062", "0.250 ± 0.062"),
    "first token, times as fast": ("–", "5.00"),
    "decoding, tokens/s": ("12.5", "12.5"),
    "decoding, times as fast": ("–", "6.00"),
    "peak memory, MB": ("2.0", "2.0"),
    "cache kept, MB": ("–", "–"),
    "weights": ("unchanged", "unchanged"),
}


def column(name: str, density: float, beside: AgainstDense | None) -> Column:
    speeds = (Estimate(0.25, 0.0625), Estimate(12.5, None))
    return Column(
        name, None, density, (3.0,), Estimate(19.75, 1.5), beside, (), None, *speeds, 2_000_000, None, "0" * 64
    )


def test_every_figure_has_its_row() -> None:
    beside = AgainstDense(*(Estimate(float(index), None) for index in range(1, len(FIGURES) + 1)))
    columns = (column("dense", 1.0, None), column("patched", 0.375, beside))
    machine = PilotMachine("a processor", "cpu", "fp32", 2, "2", "5", "2026-01-01")
    table = pilot_table(Pilot("a model", "0" * 64, "2" * 64, 64, (), machine, columns, (), 12.0))
    assert table.heads == ("dense", "patched")
    assert {row.name: row.cells for row in table.rows} == ROWS
    assert [row.name for row in table.rows] == list(ROWS)
