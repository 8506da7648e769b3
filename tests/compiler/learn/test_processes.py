"""`surgeon learn`, `assess` and `pilot` under torchrun: two processes find what one does, and only one prints."""

import json
from pathlib import Path
from typing import Any

import pytest

from models import sparse_topology
from processes import torchrun
from surgeon.compiler import compile_package
from surgeon.compiler.cli.main import main
from surgeon.compiler.topology.read import read_topology
from surgeon.runtime.evaluate.pilot.pilot_file import read_pilot

# One thread, as torchrun sets it for each process, so that results are equal to the bit.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SCRIPT = Path(__file__).with_name("command_process.py")


def measuring(command: str, folder: Path) -> list[str]:
    texts = ["--text", str(folder / "a.txt"), "--text", str(folder / "b.txt")]
    return [command, str(folder / "model"), *texts, "--density", "0.5", "--length", "128", "--block", "16"]


def learning(folder: Path, out: Path, *more: str) -> list[str]:
    return [*measuring("learn", folder), "--out", str(out), *more, "--work", str(out.with_suffix(".steps"))]


def piloting(folder: Path, package: Path, out: Path) -> list[str]:
    texts = ["--text", str(folder / "a.txt"), "--text", str(folder / "b.txt")]
    size = ["--length", "256", "--sequences", "1", "--tasks", "1", "--max-ppl-ratio", "50", "--rounds", "1"]
    return ["pilot", str(folder / "model"), str(package), *texts, *size, "--out", str(out)]


def quality(pilot: Path) -> list[Any]:
    found = read_pilot(pilot)
    columns = found.columns
    numbers: list[Any] = [number for each in found.dropped_tasks for number in (each.questions, each.score)]
    for column in columns:
        beside = column.against_dense
        numbers += [*column.losses, *column.scores]
        numbers += [beside.divergence.value, beside.late_divergence.value, beside.agreement.value] if beside else []
    return numbers


def test_two_processes_find_what_one_does_and_go_on_from_what_one_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = compile_package(sparse_topology(), tmp_path / "kernels", dtypes=("fp32",))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    methods = {"budget": ("--cuts",), "ultrametric": ("--method", "ultrametric", "--steps", "7", "--batch", "3")}

    def commands(place: Path) -> list[list[str]]:
        learns = [learning(folder, tmp_path / f"{method}.json", *more) for method, more in methods.items()]
        return [*learns, [*measuring("assess", folder), "--json"], piloting(folder, package, place / "pilot.json")]

    *learns, assess, pilot = commands(tmp_path / "one")
    for arguments in learns:
        assert main(arguments) == 0
    capsys.readouterr()
    assert main(assess) == 0
    assessed = capsys.readouterr().out
    assert main(pilot) == 0
    capsys.readouterr()
    alone = {method: read_topology(tmp_path / f"{method}.json") for method in methods}
    removed = {}
    for method in methods:
        (tmp_path / f"{method}.json").unlink()
        steps = sorted((tmp_path / f"{method}.steps").iterdir())
        removed[method] = (len(steps[::2]), len(steps[1::2]))
        for step in steps[::2]:
            step.unlink()

    output = torchrun(SCRIPT, *(argument for each in commands(tmp_path / "two") for argument in ("+", *each)))
    assert output.count("budget.json: budget, ") == 1, output
    assert output.count(assessed) == 1, output
    assert output.count("pilot.json: written") == 1, output
    for method in methods:
        together = read_topology(tmp_path / f"{method}.json")
        assert together.sha256 == alone[method].sha256
        for figure in ("validation", "texts", "sequences", "weights_sha256"):
            assert together.provenance[figure] == alone[method].provenance[figure]
        computed, found = removed[method]
        assert together.provenance["steps"] == {"computed": computed, "found": found}
    assert quality(tmp_path / "two" / "pilot.json") == pytest.approx(quality(tmp_path / "one" / "pilot.json"), rel=1e-6)
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["pilot.json"]

    assert main([*learns[0], "--json"]) == 0  # and one continues from what two left
    assert json.loads(capsys.readouterr().out)["provenance"]["steps"]["computed"] == 0


def test_bad_input_is_one_line_of_one_process_and_status_2(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0\1")
    output = torchrun(SCRIPT, *learning(folder, tmp_path / "t.json", "--text", str(tmp_path / "binary")), fails=True)
    assert output.count("surgeon: ") == output.count("expected UTF-8 text") == 1, output
    assert "exitcode  : 2 " in output, "torchrun's report of the main process"
    assert not (tmp_path / "t.json").exists()
