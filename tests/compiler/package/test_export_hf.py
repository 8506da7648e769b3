"""The export for Hugging Face's kernels: imported by that library, offline, it computes what the package does."""

import dataclasses
import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import packages
from hub_cache import cached
from models import padded, routed_topology, sparse_topology, tiny_llama
from surgeon.compiler import compile_package
from surgeon.compiler.cli import main as cli
from surgeon.compiler.package.export_hf import Build, builds, export
from surgeon.compiler.system import atomic_files
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime import load, patch, unpatch
from surgeon.runtime.errors import PackageError

kernels = pytest.importorskip("kernels")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return compile_package(sparse_topology(), tmp_path / "package", dtypes=("fp32",))


@pytest.fixture
def light(tmp_path: Path) -> Path:
    """A package for all kinds of target, with kernels that nothing can run."""
    return packages.write(tmp_path / "light", sparse_topology(), ("cpu", "cuda:80", "cuda:90", "hip:gfx942"))


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("topology", [sparse_topology(), routed_topology()], ids=["sparse", "routed"])
def test_the_installed_kernels_import_it(topology: Topology, tmp_path: Path) -> None:
    package = compile_package(topology, tmp_path / "package", dtypes=("fp32",))
    kernel = kernels.get_local_kernel(export(package, tmp_path / "out"), backend="cpu")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 70, 32, generator=generator) for heads in (4, 2, 2))
    itself = load(package)
    assert torch.equal(kernel.attention(1, q, k, v), itself.attention(1, q, k, v))
    assert torch.equal(kernel.attention_with_lse(1, q, k, v)[1], itself.attention_with_lse(1, q, k, v)[1])

    model, (ids, mask) = tiny_llama(), padded((70, 41, 5))
    found = []
    with torch.no_grad():
        for put, take in ((kernel.patch, kernel.unpatch), (lambda model: patch(model, itself), unpatch)):
            put(model)
            found.append(model(ids, attention_mask=mask).logits)
            take(model)
    assert torch.equal(*found)


@pytest.mark.usefixtures("_offline")
def test_a_changed_file_is_not_loaded(package: Path, tmp_path: Path) -> None:
    build = export(package, tmp_path / "out") / "build" / "torch-cpu"
    library = build / "package" / "cpu" / "attention.so"
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(data)
    with pytest.raises(PackageError, match=r"attention\.so: expected SHA-256"):
        kernels.get_local_kernel(tmp_path / "out", backend="cpu")


@pytest.mark.usefixtures("_offline")
def test_it_is_imported_from_the_hubs_cache(package: Path, tmp_path: Path) -> None:
    snapshot = cached(export(package, tmp_path / "out"), tmp_path / "hub" / "kernels--me--attention")
    inside = snapshot / "build" / "torch-cpu" / "package"
    assert (inside / "manifest.json").is_symlink()
    kernel = kernels.get_local_kernel(snapshot, backend="cpu")
    q, k, v = (torch.randn(1, heads, 70, 32) for heads in (4, 2, 2))
    assert torch.equal(kernel.attention(1, q, k, v), load(package).attention(1, q, k, v))
    with pytest.raises(PackageError, match=r"got a symbolic link into the Hub's cache; copy the package \(cp -rL\)"):
        load(inside)


@pytest.mark.usefixtures("_offline")
def test_a_link_out_of_the_repository_is_not_followed(package: Path, tmp_path: Path) -> None:
    snapshot = cached(export(package, tmp_path / "out"), tmp_path / "hub" / "kernels--me--attention")
    library = snapshot / "build" / "torch-cpu" / "package" / "cpu" / "attention.so"
    library.unlink()
    library.symlink_to(package / "cpu" / "attention.so")  # the same bytes
    with pytest.raises(
        PackageError, match=r"attention\.so: expected a file or folder, got a symbolic link; do not use"
    ):
        kernels.get_local_kernel(snapshot, backend="cpu")


def test_two_exports_are_equal(light: Path, tmp_path: Path) -> None:
    first, second = (contents(export(light, tmp_path / name)) for name in ("first", "second"))
    assert first == second


def test_every_build_is_described_as_kernels_reads_it(light: Path, tmp_path: Path) -> None:
    out = export(light, tmp_path / "out")
    expected = {"cpu": None, "cuda": ["8.0", "9.0a"], "rocm": ["gfx942"]}
    assert sorted(build.name for build in (out / "build").iterdir()) == [f"torch-{name}" for name in expected]
    for backend, archs in expected.items():
        build = out / "build" / f"torch-{backend}"
        metadata = kernels.Metadata.read_from_file(build / "metadata.json")
        assert str(metadata.name) == "surgeon-attention"
        assert metadata.id == f"_surgeon_attention_{backend}_{load_id(light)[:12]}"
        assert str(metadata.backend.backend_type).lower().endswith(backend)
        assert metadata.backend.archs == archs
        found = kernels._rust.Digest.hash_variant(metadata.digest.algorithm, build)
        metadata.digest.validate(found)
        assert contents(build / "package") == contents(light)


def load_id(package: Path) -> str:
    from surgeon.runtime.package.reader import read_package

    return read_package(package).id


def test_a_packages_text_does_not_become_code(tmp_path: Path) -> None:
    topology = sparse_topology()
    evil = dataclasses.replace(topology.model, model_type='"""\nraise SystemExit("code")\n"""')
    package = packages.write(tmp_path / "evil", dataclasses.replace(topology, model=evil))
    for file, data in contents(export(package, tmp_path / "out")).items():
        assert file.endswith(("topology.json", "manifest.json")) or b"SystemExit" not in data, file


def test_variants() -> None:
    assert builds(["cuda:100", "cuda:86", "cpu"]) == (Build("cpu", ()), Build("cuda", ("10.0a", "8.6")))


def test_an_export_is_replaced_and_nothing_else(light: Path, tmp_path: Path) -> None:
    out = export(light, tmp_path / "out")
    before = contents(out)
    assert contents(export(light, out)) == before
    (out / ".git").mkdir()
    with pytest.raises(PackageError, match="expected an export for Hugging Face's kernels, an empty folder or nothing"):
        export(light, out)
    with pytest.raises(PackageError, match="something else"):
        export(light, light)
    assert load_id(light)


def test_a_failure_leaves_what_was_there(light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export(light, tmp_path / "out")
    before = contents(tmp_path)
    write = atomic_files._write_durably
    steps: Iterator[int] = iter(range(7))

    def fail(path: Path, data: bytes) -> None:
        if next(steps, None) is None:
            raise OSError(28, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(atomic_files, "_write_durably", fail)
    with pytest.raises(OSError, match="No space left"):
        export(light, out)
    with pytest.raises(OSError, match="No space left"):
        export(light, tmp_path / "new")
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_the_command(light: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "--format", "hf-kernels", str(light), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == cli.DONE
    assert capsys.readouterr().out == f"{tmp_path}/out: torch-cpu, torch-cuda, torch-rocm\n"
    assert cli.main([*arguments, "--json"]) == cli.DONE
    made: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert made == {"path": f"{tmp_path}/out", "builds": ["torch-cpu", "torch-cuda", "torch-rocm"]}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755

    (light / "topology.json").write_text("{}")
    assert cli.main([*arguments[:-1], str(tmp_path / "other")]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert "topology.json: expected" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()
