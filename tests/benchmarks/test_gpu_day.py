"""The day on a card, rehearsed on a CPU: every stage, what is left of one that fails or is cut off, and the results."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from compiled_code import spills
from gpu_day import __main__ as command
from gpu_day import run as runner
from gpu_day import suite
from gpu_day.day import DAYS, HOPPER
from gpu_day.packages import candidates, prepared
from gpu_day.report import markdown
from gpu_day.stages import STAGES
from gpu_day.tiles import best_tiles
from gpu_sources import prefill_sources
from inputs.topologies import Shape
from surgeon.compiler.kernels.gpu.compile import build_triton
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.specs.tiles import Tile, read_tiles, tiles_of
from surgeon.runtime.package.target import Target


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    assert command.main(["--packages", str(folder), "--prepare", "--day", "rehearsal"]) == 0
    return folder


@pytest.mark.slow
def test_a_whole_day(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    status = command.main(["--packages", str(packages), "--out", str(out), "--day", "rehearsal"])
    results = json.loads((out / "results.json").read_text("utf-8"))
    log = (out / "log.txt").read_text("utf-8")
    assert {name: found["status"] for name, found in results["stages"].items()} == dict.fromkeys(STAGES, "done"), log
    assert status == 0
    smoke, tests, tiles, speed, model = (results["stages"][name]["rows"] for name in STAGES)
    assert [row["phase"] for row in smoke[1:]] == ["prefill", "decode"]
    assert (tests[0]["test"], tests[0]["failed"]) == ("test_prefill", 0)
    assert tests[0]["skipped"] + tests[0]["passed"] == 20
    assert len(tiles) == 1
    assert all(row[name] < 5e-3 for row in tiles for name in ("prefill_error", "decode_error"))
    assert [(row["phase"], row["batch"]) for row in speed] == 2 * [("prefill", 1), ("decode", 1), ("decode", 2)]
    assert all(row["error"] < 5e-3 and row["ours_ms"] > 0 for row in speed)
    assert [row["what"] for row in model] == ["first token", "decoded token"]
    page = (out / "results.md").read_text("utf-8")
    assert all(f"## {name}: done" in page for name in STAGES)
    with pytest.raises(SystemExit, match="expected a day on a card, got a rehearsal"):
        command.main(["--out", str(out), "--keep"])


def test_a_failed_smoke_call_ends_the_day_and_leaves_its_package(packages: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "packages"
    for folder in ("smoke", "smoke-stages"):
        shutil.copytree(packages / folder, damaged / folder)
    for file in (damaged / "smoke").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    out = tmp_path / "results"
    results = runner.run("rehearsal", damaged, out, list(STAGES))
    assert list(results["stages"]) == ["smoke"]
    found = results["stages"]["smoke"]
    assert found["status"] == "failed"
    assert [row["device"] for row in found["rows"]] == ["cpu"]  # what was told before it failed
    assert "PackageError" in found["error"]
    with tarfile.open(out / "smoke-package.tar.gz") as package, tarfile.open(out / "smoke-stages.tar.gz") as stages:
        assert "./manifest.json" in package.getnames()
        assert "./2-schedule.txt" in stages.getnames()


def test_a_stage_that_is_cut_off_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import sys, time\n"
        "rows = sys.argv[sys.argv.index('--rows') + 1]\n"
        'open(rows, \'w\').write(\'{"row": 1}\\n{"row": 2}\\n{"ro\')\n'
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(runner, "MAIN", child)
    found = runner.run_stage("rehearsal", "speed", tmp_path, tmp_path, 2)
    assert (found["status"], found["rows"]) == ("cut off", [{"row": 1}, {"row": 2}])


def test_the_days_limits_fit_eight_minutes() -> None:
    for day in DAYS.values():
        assert len(day.limits) == len(STAGES)
    assert sum(HOPPER.limits) <= 8 * 60


def test_every_package_of_a_day_has_its_own_name_and_is_small() -> None:
    for day in DAYS.values():
        names = [each.name for each in prepared(day)]
        assert len(names) == len(set(names))


def test_candidates_begin_with_the_present_tiles() -> None:
    pytest.importorskip("triton")
    for shape in HOPPER.shapes:
        pairs = candidates(HOPPER, shape)
        assert len(set(pairs)) == HOPPER.candidates


@pytest.mark.slow
@pytest.mark.parametrize("shape", HOPPER.shapes, ids=lambda shape: f"head size {shape.head_dim}")
def test_the_days_own_tiles_are_tried_and_spill_nothing(shape: Shape, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    target = Target.parse(HOPPER.target)
    topology = HOPPER.topology(shape, 32 * shape.block_size, 0.25)
    tiles = [prefill for prefill, _ in candidates(HOPPER, shape) if prefill]
    own = [tile for tile in HOPPER.prefill_tiles if tile in tiles]
    assert [tile for tile in HOPPER.prefill_tiles if tile not in own and tile.heads == 1] == []
    for tile in own:
        table = {target: tiles_of(target).with_tile("prefill", shape.head_dim, tile)}
        specs = specialize_gpu(topology, schedule_layers(topology), target, [HOPPER.dtype], table)
        for source in prefill_sources(specs):
            assert source.tile.heads == tile.heads
            assert spills(build_triton(source, HOPPER.dtype), tmp_path) == 0, tile


def test_a_table_of_the_best_tiles_can_be_read(tmp_path: Path) -> None:
    shape = HOPPER.shapes[0]
    rows = [
        {"head_dim": shape.head_dim, "prefill_tile": [64, 32, 4, 2], "prefill_ms": 2.0},
        {
            "head_dim": shape.head_dim,
            "prefill_tile": [128, 64, 8, 2, "descriptors"],
            "prefill_ms": 1.0,
            "fault": "decode failed",
        },
        {"head_dim": 96, "prefill_tile": [64, 64, 4, 2], "prefill_ms": 0.5},
    ]
    file = tmp_path / "tiles.json"
    file.write_text(best_tiles(HOPPER, rows, "a test"), encoding="utf-8")
    (tiles,) = (table for target, table in read_tiles(file).items() if target == Target.parse(HOPPER.target))
    found = tiles.listed("prefill", shape.head_dim)
    assert found == Tile(128, 64, 8, 2, "descriptors")


def test_the_tests_counts_and_failures_are_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="a"/>'
        '<testcase name="b"><failure message="an illegal access"/></testcase></testsuite></testsuites>'
    )
    assert suite.counted(report) == {"passed": 1, "skipped": 1, "failed": 1, "failures": {"b": "an illegal access"}}
    assert suite.functions()[0] == "test_prefill"
    assert suite.functions()[-2:] == ["test_shapes", "test_dense_rows"]


@pytest.mark.gpu
def test_that_needs_no_gpu() -> None:
    """Run by the next test, as the suite runs those that need one: they are all skipped here, before any fixture."""


def test_the_suite_runs_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite, "TESTS", Path(__file__))
    row = suite.outcome(test_that_needs_no_gpu.__name__, tmp_path)
    assert (row["passed"], row["failures"]) == (1, {})
    assert (tmp_path / "d" / "surgeon").is_dir()  # the compiled parts


def test_cells_of_a_page_stay_on_their_lines() -> None:
    rows = [{"a": "one\ntwo | three"}, {"b": 0.123456}, {"launching": "hidden"}]
    page = markdown(
        {"day": "d", "target": "t", "rehearsal": True, "stages": {"s": {"status": "done", "seconds": 1, "rows": rows}}}
    )
    assert "| one two \\| three |  |\n|  | 0.1235 |\n" in page
    assert "hidden" not in page


def test_packages_that_are_too_large_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "prepare", lambda *_: 41 * 2**20)
    assert command.main(["--packages", str(tmp_path), "--prepare"]) == 1
    assert "41.0 MiB of at most 40" in capsys.readouterr().out
