"""The findings and drawings of `surgeon inspect`."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import packages
import surgeon.runtime
import topologies
from surgeon.compiler import read_topology
from surgeon.compiler.cli import main as cli
from surgeon.compiler.package.inspection import PackageReport, inspect, report_json, summary_of
from surgeon.compiler.package.inspection_text import report_lines
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.runtime.errors import PackageError
from surgeon.runtime.kernels.cpu import rates
from surgeon.runtime.package.manifest import FileEntry, Manifest

PATTERN_KEYS = [
    "topology_sha256",
    "model",
    "block_size",
    "num_blocks",
    "beyond",
    "dendrograms",
    "distinct_layers",
    "distinct_heads",
    "layers",
    "density",
    "mean_density",
]


def picture(lines: Sequence[str]) -> list[str]:
    """The rows of the picture: one a layer."""
    return [line for line in lines if line.startswith("layer ")]


def write(tmp_path: Path, *heads: dict[str, object], num_blocks: int = 4, layers: int = 2) -> Path:
    tree = {"linkage": topologies.balanced_tree(num_blocks)}
    file = tmp_path / "topology.json"
    file.write_text(json.dumps(topologies.document([list(heads)] * layers, [tree], num_blocks=num_blocks)))
    return file


@pytest.mark.parametrize("beyond", ["window", "dense", "error"])
@pytest.mark.parametrize(("seed", "num_blocks"), [(0, 1), (1, 7), (2, 33), (3, 64)])
def test_density_is_that_of_the_definition(seed: int, num_blocks: int, beyond: str) -> None:
    topology = topologies.random_topology(
        np.random.default_rng(seed),
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        block_size=64,
        num_blocks=num_blocks,
        beyond=beyond,
    )
    summary = summary_of(topology, schedule_layers(topology))
    expected = np.array([topology.block_mask(layer, num_blocks).sum(axis=(1, 2)) for layer in range(3)])
    expected = expected / (num_blocks * (num_blocks + 1) // 2)
    np.testing.assert_array_equal(summary.density, expected)
    assert summary.mean_density == pytest.approx(expected.mean(), rel=1e-15)


def test_equal_heads_and_layers_are_counted_once(tmp_path: Path) -> None:
    heads = [topologies.head(cut=0.0), topologies.head(cut=0.5), topologies.DENSE]  # the tree has no height below 1
    report = inspect(write(tmp_path, *heads, layers=3))
    assert report.summary.distinct_layers == 1
    assert report.summary.distinct_heads == 2


def test_a_topology_file_as_json(tmp_path: Path) -> None:
    file = write(tmp_path, topologies.DENSE, topologies.head())
    found = json.loads(report_json(inspect(file)))
    assert list(found) == ["kind", "path", "bytes", "sha256", *PATTERN_KEYS]
    assert found["kind"] == "topology"
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["bytes"] == file.stat().st_size
    assert found["density"] == [[1.0, 0.4], [1.0, 0.4]]
    assert found["mean_density"] == 0.7
    assert found["model"]["num_attention_heads"] == 2


def test_a_picture_has_a_row_a_layer_and_a_bar_a_head(tmp_path: Path) -> None:
    file = write(tmp_path, topologies.DENSE, topologies.head(), topologies.head(window=2))
    lines = report_lines(inspect(file), 80, "utf-8")
    assert picture(lines) == ["layer 0  █▄▆  0.700", "layer 1  █▄▆  0.700"]


def test_routed_heads_are_counted(tmp_path: Path) -> None:
    topology = topologies.build([[topologies.window_head(1, 2, route=3), topologies.window_head()], []], num_blocks=8)
    lines = report_lines(inspect(packages.write(tmp_path / "kernels", topology)), 80, "utf-8")
    assert "routed     1 head of all layers, which choose blocks by content" in lines
    assert sum(" 1 routed " in line for line in lines) == 1


def test_a_layer_that_is_not_covered_counts_for_nothing(tmp_path: Path) -> None:
    file = tmp_path / "topology.json"
    tree = {"linkage": topologies.balanced_tree(4)}
    file.write_text(json.dumps(topologies.document([[], [topologies.head()] * 2], [tree], num_blocks=4)))
    report = inspect(file)
    assert report.summary.density == ((), (0.4, 0.4))
    assert report.summary.mean_density == 0.4
    assert (report.summary.distinct_layers, report.summary.distinct_heads) == (1, 1)
    lines = report_lines(report, 80, "utf-8")
    assert picture(lines) == ["layer 0  not covered", "layer 1  ▄▄  0.400"]
    assert "        0  not covered" in lines
    packaged = inspect(packages.write(tmp_path / "kernels", read_topology(file), ["cpu", "cuda:90"]))
    assert packaged.summary == report.summary
    assert picture(report_lines(packaged, 80, "utf-8")) == picture(lines)
    uncovered, covered = json.loads(report_json(packaged))["runs"]
    assert uncovered is None
    assert covered["on_gpu"] == [{"target": "cuda:90", "kernels": 1, "by_table": False}]


def test_bars_are_ascii_where_the_encoding_has_none(tmp_path: Path) -> None:
    report = inspect(write(tmp_path, topologies.DENSE, topologies.head()))
    for encoding in ("ascii", "latin-1", "cp437", "no such encoding"):
        lines = report_lines(report, 80, encoding)
        assert "".join(lines).isascii()
        assert picture(lines)[-1] == "layer 1  @=  0.700"


@pytest.mark.parametrize("width", [1, 20, 40])
def test_a_narrow_picture_puts_several_heads_into_a_cell(tmp_path: Path, width: int) -> None:
    report = inspect(write(tmp_path, *[topologies.DENSE, topologies.head()] * 16))
    lines = report_lines(report, width, "utf-8")
    assert any("a cell is the mean of" in line for line in lines)
    assert all(len(line) <= max(width, 17) for line in lines if line.startswith("layer "))
    assert picture(lines)[-1].endswith("0.700")


def test_a_wide_terminal_gives_every_head_its_cell(tmp_path: Path) -> None:
    lines = report_lines(inspect(write(tmp_path, *[topologies.DENSE] * 32)), 80, "utf-8")
    assert picture(lines)[-1] == f"layer 1  {'█' * 32}  1.000"
    assert not any("a cell is the mean of" in line for line in lines)


def test_a_long_topology_is_counted_without_being_expanded() -> None:
    # Expanded, one head would be a table of 268 million entries.
    topology = topologies.window_topology([1, 8], num_blocks=16_384)
    num_blocks = topology.num_blocks
    visible = [sum(min(row + 1, window + 1) for row in range(num_blocks)) for window in (1, 8)]
    causal = num_blocks * (num_blocks + 1) / 2
    assert summary_of(topology, schedule_layers(topology)).density == (tuple(pairs / causal for pairs in visible),)


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "█"), ("ascii", "@")])
def test_a_process_prints_no_escape_codes(tmp_path: Path, encoding: str, bar: str) -> None:
    file = write(tmp_path, topologies.DENSE).rename(tmp_path / "to\x1b[31mpo\u20ac.json")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from surgeon.compiler.cli.main import main; sys.exit(main())",
            "inspect",
            file,
        ],
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding, "FORCE_COLOR": "1", "COLUMNS": "20"},
        timeout=300,
    )
    assert result.returncode == 0
    assert result.stderr == b""
    printed = result.stdout.decode(encoding)
    assert printed.replace("\n", "").isprintable()
    assert r"to\x1b[31mpo" in printed
    assert f"layer 0  {bar}  1.000" in printed


def test_the_command_prints_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, topologies.DENSE)
    assert cli.main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(report_json(inspect(file)))
    assert cli.main(["inspect", str(file)]) == 0
    text = capsys.readouterr().out
    assert inspect(file).summary.topology_sha256 in text
    assert "llama: 2 layers, 1 head, 1 KV head, head size 32" in text


def test_a_package_as_json(tmp_path: Path) -> None:
    topology = topologies.window_topology([1, 2], num_layers=2, num_blocks=4)
    folder = packages.write(tmp_path / "kernels", topology)
    found = json.loads(report_json(inspect(folder)))
    assert list(found) == ["kind", "path", "id", "bytes", "targets", "kernels", "files", "tools", "runs", *PATTERN_KEYS]
    assert found["kind"] == "package"
    assert found["id"] == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert found["topology_sha256"] == topology.sha256
    assert found["targets"] == ["cpu"]
    assert [kernel["dtype"] for kernel in found["kernels"]] == ["fp32", "bf16", "fp16"]
    assert found["bytes"] == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    own = {"name": "surgeon", "version": surgeon.runtime.__version__}
    assert found["tools"] == [{"name": "g++", "version": "g++ (Debian) 12"}, own]
    np.testing.assert_allclose(found["density"], [topology.density(0), topology.density(1)])


def test_a_package_for_people(tmp_path: Path) -> None:
    folder = packages.write(tmp_path / "kernels", topologies.window_topology([1, 2], num_layers=2, num_blocks=4))
    report = inspect(folder)
    assert isinstance(report, PackageReport)
    text = "\n".join(report_lines(report, 80, "utf-8"))
    assert report.id in text
    assert report.summary.topology_sha256 in text
    assert "cpu: 3 kernels, fp32, bf16, fp16" in text
    assert "cpu/attention.so" not in text
    assert "        1  attention_000    2 heads      4 pieces  cpu: every block seen up to token 128" in text


@pytest.mark.parametrize("direct", [False, True])
def test_a_package_says_if_calls_go_without_python(tmp_path: Path, direct: bool) -> None:
    topology = topologies.window_topology([1, 2], num_layers=2, num_blocks=4)
    report = inspect(packages.write(tmp_path / "kernels", topology, ("cpu", "cuda:90"), direct))
    said = [line for line in report_lines(report, 80, "utf-8") if "without Python" in line]
    kernels = "target     cpu: 3 kernels, fp32, bf16, fp16"
    assert said == ([f"{kernels}; plain calls go without Python"] if direct else [])


def test_a_package_says_if_it_has_kernels_for_pages(tmp_path: Path) -> None:
    topology = topologies.window_topology([1, 2], num_layers=2, num_blocks=4)
    report = inspect(packages.write(tmp_path / "kernels", topology, ("cpu", "cuda:90")))
    assert isinstance(report, PackageReport)
    assert not [line for line in report_lines(report, 80, "utf-8") if "in pages" in line]
    entries = [kernel for kernel in report.manifest.kernels if kernel.target == "cuda:90"]
    paged = tuple(dataclasses.replace(kernel, phase=f"paged_{kernel.phase}") for kernel in entries)
    manifest = dataclasses.replace(report.manifest, kernels=report.manifest.kernels + paged)
    (line,) = [
        line for line in report_lines(dataclasses.replace(report, manifest=manifest), 80, "utf-8") if "in pages" in line
    ]
    assert line == f"target     cuda:90: {2 * len(entries)} kernels, bf16, fp16; also for keys and values in pages"


def test_what_a_person_wants_comes_first_and_the_hashes_last(tmp_path: Path) -> None:
    folder = packages.write(tmp_path / "kernels", topologies.window_topology([1, 2], num_layers=2, num_blocks=4))
    file = write(tmp_path, topologies.DENSE, topologies.head())
    for path, heads in (
        (folder, ["package", "target", "model", "blocks", "density", "schedules"]),
        (file, ["topology", "model", "blocks", "density", "schedules"]),
    ):
        lines = report_lines(inspect(path), 80, "utf-8")
        assert [line.split()[0] for line in lines[: lines.index("")]] == heads
        assert [number for number, line in enumerate(lines) if re.search("[0-9a-f]{64}", line)] == [
            len(lines) - 3,
            len(lines) - 2,
        ]
        assert lines[-1] == "weights    any"
    assert "density    70.0% of the causal pairs" in "\n".join(report_lines(inspect(file), 80, "utf-8"))


def test_the_hashes_are_those_that_sha256sum_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packages.write(tmp_path / "kernels", topologies.window_topology([1, 2], num_layers=2, num_blocks=4))
    assert cli.main(["inspect", str(folder), "--files"]) == 0
    text = capsys.readouterr().out
    assert "tool       g++: g++ (Debian) 12" in text
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert f"{digest}  {path.relative_to(folder).as_posix()}, {path.stat().st_size:,} bytes" in text
    file = write(tmp_path, topologies.DENSE)
    assert cli.main(["inspect", str(file)]) == 0
    assert f"sha256     {hashlib.sha256(file.read_bytes()).hexdigest()}, of the file" in capsys.readouterr().out


def test_a_damaged_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packages.write(tmp_path / "kernels", topologies.window_topology([1], num_blocks=4))
    (folder / "cpu" / "attention.so").write_bytes(packages.CODE[::-1])
    assert cli.main(["inspect", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"surgeon: {folder}/cpu/attention.so: expected SHA-256")
    assert err.count("\n") == 1


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"expected a package with manifest\.json"):
        inspect(tmp_path)


@pytest.mark.parametrize("beyond", ["window", "dense", "error"])
def test_a_package_has_the_pattern_of_its_topology(tmp_path: Path, beyond: str) -> None:
    topology = topologies.random_topology(
        np.random.default_rng(7),
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        block_size=64,
        num_blocks=19,
        beyond=beyond,
    )
    folder = packages.write(tmp_path / "kernels", topology, ["cpu", "cuda:90"])
    assert inspect(folder).summary == summary_of(topology, schedule_layers(topology))


def test_layers_with_one_schedule_have_one_kernel(tmp_path: Path) -> None:
    near, far = topologies.head(window=1), topologies.head(window=2)
    layers = [[near, far], [far, near], [near, far], [far, far]]
    topology = topologies.build(layers, [{"linkage": topologies.balanced_tree(8)}])
    found = inspect(packages.write(tmp_path / "kernels", topology)).summary.layers
    assert [layer.kernel for layer in found] == [0, 1, 0, 2]
    assert [layer.distinct_heads for layer in found] == [2, 2, 2, 1]
    pieces = {head: len(head.pieces) for layer in schedule_layers(topology) for head in layer.heads}
    assert len(pieces) == 2
    assert [layer.pieces for layer in found] == [sum(pieces.values())] * 3 + [max(pieces.values())]


def test_how_each_layer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {variant: {"fp32": {"64": 1.25}} for variant in rates.VARIANTS}
    measured["portable"] = {"fp32": {"64": 0.5}, "bf16": {"64": 0.25}}
    monkeypatch.setattr(rates, "_measured", lambda: {"avx2": measured})
    layers = [[topologies.DENSE, topologies.DENSE], [topologies.DENSE, topologies.head(window=3)]]
    topology = topologies.build(layers, [{"linkage": topologies.balanced_tree(8)}])
    report = inspect(packages.write(tmp_path / "kernels", topology, ["cpu", "cuda:90", "hip:gfx942"]))
    dense, sparse = json.loads(report_json(report))["runs"]
    on_gpu = [{"target": target, "kernels": 1, "by_table": False} for target in ("cuda:90", "hip:gfx942")]
    assert dense["on_gpu"] == sparse["on_gpu"] == on_gpu
    assert list(dense["on_cpu"]) == ["x86_64_amx", "x86_64_v4", "x86_64_v3", "portable"]
    time = f"of dense attention's time, {report.on_cpu[0].level}"
    slow = f"portable takes 2 (fp32), 4 (bf16), 1 (fp16) {time}"
    fast = f"x86_64_v3 takes 0.8 (fp32), 1 (bf16, fp16) {time}"
    mixed = "sdpa (fp32, bf16), kernel (fp16)"
    assert dense["on_cpu"]["portable"] == f"{mixed}: layer 0 sees every block; {slow}"
    assert sparse["on_cpu"]["portable"] == f"{mixed}: layer 1 sees every block; {slow}"
    assert dense["on_cpu"]["x86_64_v3"] == f"kernel: layer 0 sees every block; {fast}"
    lines = report_lines(report, 80, "utf-8")
    gpus = "cuda:90: 1 kernel  hip:gfx942: 1 kernel"
    assert f"        0  attention_000    1 head      1 piece  {gpus}  cpu: every block seen" in lines
    assert f"        1  attention_001    2 heads      3 pieces  {gpus}  cpu: every block seen up to token 192" in lines
    assert f"on cpu     x86_64_v3: kernel; {fast}" in lines
    assert f"on cpu     portable: {mixed} for a prefill that sees every block, else kernel; {slow}" in lines


def test_a_layer_whose_schedule_is_a_table(tmp_path: Path) -> None:
    folder = packages.write(tmp_path / "kernels", topologies.window_topology([1, 2]), ["cuda:90"])
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    kernels = tuple(dataclasses.replace(kernel, table="prefill_2x1") for kernel in manifest.kernels)
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, kernels=kernels).to_json())
    report = inspect(folder)
    (run,) = json.loads(report_json(report))["runs"]
    assert run["on_gpu"] == [{"target": "cuda:90", "kernels": 1, "by_table": True}]
    assert any(line.endswith("cuda:90: 1 kernel, by table") for line in report_lines(report, 80, "utf-8"))


def listed_again(folder: Path, path: str, data: bytes) -> None:
    """Puts other bytes into a file of a package, and their size and hash into its manifest."""
    (folder / path).write_bytes(data)
    manifest = Manifest.from_json((folder / "manifest.json").read_text())
    files = tuple(
        FileEntry(path, len(data), hashlib.sha256(data).hexdigest()) if file.path == path else file
        for file in manifest.files
    )
    (folder / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (topologies.window_topology([1], sink=0, num_blocks=4).canonical(), "topology.json: expected SHA-256"),
        ("{}", "topology.json: expected SHA-256"),
    ],
)
def test_a_package_with_another_topology_is_refused(tmp_path: Path, text: str, words: str) -> None:
    folder = packages.write(tmp_path / "kernels", topologies.window_topology([1], sink=1, num_blocks=4))
    listed_again(folder, "topology.json", text.encode())
    with pytest.raises(PackageError, match=words):
        inspect(folder)
