"""Every fault of a package with its message: the reader trusts nothing."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import packages
from surgeon.compiler import compile_package
from surgeon.runtime import __version__
from surgeon.runtime.errors import PackageError, printable
from surgeon.runtime.package import reader
from surgeon.runtime.package.manifest import Manifest
from surgeon.runtime.package.reader import read_package
from topologies import window_topology


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    topology = window_topology([1, 2], head_dim=32, num_layers=2)
    return compile_package(topology, tmp_path_factory.mktemp("package") / "kernels")


@pytest.fixture
def package(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(finished, tmp_path / "kernels"))


def manifest_of(package: Path) -> Manifest:
    return Manifest.from_json((package / "manifest.json").read_text())


def rewrite(package: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Applies a change to the parsed manifest."""
    root = json.loads((package / "manifest.json").read_text())
    change(root)
    (package / "manifest.json").write_text(json.dumps(root))


def refused(package: Path, *words: str) -> None:
    with pytest.raises(PackageError) as caught:
        read_package(package)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_whole_package_is_read(package: Path) -> None:
    found = read_package(package)
    assert found.manifest == manifest_of(package)
    assert found.id == hashlib.sha256((package / "manifest.json").read_bytes()).hexdigest()
    assert {path: len(data) for path, data in found.files.items()} == {
        path.relative_to(package).as_posix(): path.stat().st_size
        for path in package.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def test_the_manifest_survives_being_written_and_read(package: Path) -> None:
    manifest = manifest_of(package)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "kernels", "expected a package folder, got nothing")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("")
    refused(tmp_path / "kernels", "expected a package folder, got a file")


def test_no_manifest(package: Path) -> None:
    (package / "manifest.json").unlink()
    refused(package, "expected a package with manifest.json")


def test_a_manifest_that_is_no_json(package: Path) -> None:
    (package / "manifest.json").write_text("{")
    refused(package, "manifest.json: line 1 column 2: expected JSON")


def test_a_manifest_nested_too_deep(package: Path) -> None:
    (package / "manifest.json").write_text("[" * 100_000)
    refused(package, "manifest.json: expected JSON of a few levels")


def test_a_manifest_that_is_no_text(package: Path) -> None:
    (package / "manifest.json").write_bytes(b"\xff\xfe")
    refused(package, "expected UTF-8 text")


def test_a_manifest_too_large(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.runtime.package.reader.MAX_MANIFEST_BYTES", 100)
    refused(package, "manifest.json: expected at most 100 bytes, got more")


def test_another_version(package: Path) -> None:
    rewrite(package, lambda root: root.update(version=3))
    refused(
        package,
        f"manifest.json: version: expected 1 or 2, got 3, as surgeon {__version__!r} writes it; "
        "compile the package again with this version of surgeon",
    )


def test_another_format(package: Path) -> None:
    rewrite(package, lambda root: root.update(format="zip"))
    refused(package, "manifest.json: format: expected 'surgeon.package'")


def test_an_unknown_key(package: Path) -> None:
    rewrite(package, lambda root: root.update(hook="os.system"))
    refused(package, "manifest.json: expected the keys", "hook")


def test_a_missing_key(package: Path) -> None:
    rewrite(package, lambda root: root.pop("kernels"))
    refused(package, "manifest.json: expected the keys", "kernels")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("block_size", "64", "manifest.json: block_size: expected a value of type int, got '64'"),
        ("num_blocks", True, "manifest.json: num_blocks: expected a value of type int, got True"),
        ("kernels", {}, "manifest.json: kernels: expected a list"),
        ("model", None, "manifest.json: model: expected an object, got None"),
        ("files", [1], "manifest.json: files[0]: expected an object, got 1"),
        ("block_size", 10**400, "manifest.json: block_size: expected an integer of 64 bits, got 1000"),
        (
            "num_blocks",
            -(2**63) - 1,
            "manifest.json: num_blocks: expected an integer of 64 bits, got -9223372036854775809",
        ),
    ],
)
def test_a_wrong_type(package: Path, key: str, value: object, words: str) -> None:
    rewrite(package, lambda root: root.update({key: value}))
    refused(package, words)


def test_a_missing_file(package: Path) -> None:
    (package / "cpu/attention.so").unlink()
    refused(package, "cpu/attention.so: expected a readable file")


def test_an_unlisted_file(package: Path) -> None:
    (package / "cpu/sitecustomize.py").write_text("")
    refused(package, "cpu/sitecustomize.py: expected only files that the manifest lists")


def test_a_file_that_grew(package: Path) -> None:
    with (package / "topology.json").open("a") as file:
        file.write(" ")
    refused(package, "topology.json: expected at most", "got more")


def test_a_file_that_shrank(package: Path) -> None:
    file = package / "topology.json"
    file.write_bytes(file.read_bytes()[:-1])
    refused(package, "topology.json: expected", "bytes, got")


def test_a_file_with_one_changed_bit(package: Path) -> None:
    file = package / "cpu/attention.so"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(package, "cpu/attention.so: expected SHA-256", "the file is damaged")


def test_a_symbolic_link_to_a_file(package: Path, tmp_path: Path) -> None:
    moved = tmp_path / "attention.so"
    (package / "cpu/attention.so").rename(moved)
    (package / "cpu/attention.so").symlink_to(moved)
    refused(package, "cpu/attention.so: expected a file or folder, got a symbolic link")


def test_a_symbolic_link_to_a_folder(package: Path, tmp_path: Path) -> None:
    (package / "cpu").rename(tmp_path / "cpu")
    (package / "cpu").symlink_to(tmp_path / "cpu")
    refused(package, "cpu: expected a file or folder, got a symbolic link")


def test_a_manifest_that_is_a_link(package: Path, tmp_path: Path) -> None:
    (package / "manifest.json").rename(tmp_path / "manifest.json")
    (package / "manifest.json").symlink_to(tmp_path / "manifest.json")
    refused(package, "manifest.json: expected a file or folder, got a symbolic link; do not use this package")


def test_a_pipe(package: Path) -> None:
    (package / "topology.json").unlink()
    os.mkfifo(package / "topology.json")
    refused(package, "topology.json: expected a regular file")


def test_a_folder_in_place_of_a_file(package: Path) -> None:
    (package / "topology.json").unlink()
    (package / "topology.json").mkdir()
    refused(package, "topology.json: expected a regular file, got a folder")
    rewrite(package, lambda root: root["files"].append(root["files"][0] | {"path": "topology.json/x"}))  # type: ignore[index, attr-defined]
    refused(package, "topology.json: expected a regular file, got a folder")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["a pipe", "a folder"])
def test_a_manifest_that_is_no_file(package: Path, make: Callable[[Path], object]) -> None:
    (package / "manifest.json").unlink()
    make(package / "manifest.json")
    refused(package, "manifest.json: expected a regular file, got a ")


def test_a_folder_without_a_listed_file_is_not_looked_into(package: Path) -> None:
    here = package / "cpu"
    for _ in range(15):
        here /= "n" * 200
        here.mkdir()
    refused(package, "cpu/nnn", "expected only files that the manifest lists, got an unlisted folder")


@pytest.mark.parametrize("path", ["cpu/\udcff", "cpu/\n", "/".join("123456789"), "n/" * 100_000 + "n"])
def test_a_path_that_no_package_has(package: Path, path: str) -> None:
    rewrite(package, lambda root: root["files"][0].update(path=path))  # type: ignore[index]
    refused(package, "files: expected paths inside the package")


def test_a_file_whose_name_is_no_text(package: Path) -> None:
    os.close(os.open(os.fsencode(package) + b"/cpu/\xff", os.O_CREAT))
    refused(package, "cpu/\udcff: expected only files that the manifest lists")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EMFILE, "raise the limit: ulimit -n"),
        (errno.EACCES, "change its permissions"),
        (errno.EIO, "compile the package again"),
    ],
)
@pytest.mark.parametrize("call", ["open", "scandir"])
def test_an_error_of_the_system_says_what_to_do(
    package: Path, call: str, code: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    refused(package, f"got {os.strerror(code)}; ", remedy)


def test_too_little_memory(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr("surgeon.runtime.package.reader.read_regular", fail)
    refused(package, "expected a package that can be read, got MemoryError; free some memory")


def test_a_path_that_is_too_long_for_the_system(tmp_path: Path) -> None:
    refused(tmp_path / ("n" * 5000), "got File name too long; use a shorter name")


def test_a_thousand_files_take_no_time_that_grows_with_their_square(package: Path) -> None:
    """Counted in calls: a set made anew for each file would be a million."""
    names = [f"cpu/{number}" for number in range(1000)]
    for name in names:
        (package / name).write_bytes(b"")
    empty = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    rewrite(package, lambda root: root["files"].extend({"path": name} | empty for name in names))  # type: ignore[attr-defined]
    hashed = 0

    class Name(str):
        def __hash__(self) -> int:
            nonlocal hashed
            hashed += 1
            return super().__hash__()

    manifest = manifest_of(package)
    files = tuple(replace(entry, path=Name(entry.path)) for entry in manifest.files)
    reader._check_listing(package, replace(manifest, files=files))
    with reader._opened(package) as place:
        reader._check_folder(reader._Place(package, place, None), {Name(entry.path) for entry in files})
    assert len(files) < hashed < 10 * len(files)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "cpu/../../secret", "cpu\\x", "./topology.json", "cpu//x"]
)
def test_a_path_that_leaves_the_folder(package: Path, path: str) -> None:
    rewrite(package, lambda root: root["files"][0].update(path=path))  # type: ignore[index]
    refused(package, "expected paths inside the package")


def test_a_path_listed_twice(package: Path) -> None:
    rewrite(package, lambda root: root["files"].append(root["files"][0]))  # type: ignore[index, attr-defined]
    refused(package, "each once")


@pytest.mark.parametrize("size", [-1, 2**40])
def test_a_size_out_of_bounds(package: Path, size: int) -> None:
    rewrite(package, lambda root: root["files"][0].update(size=size))  # type: ignore[index]
    refused(package, "expected at most")


def test_a_package_too_large_in_all(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.runtime.package.reader.MAX_PACKAGE_BYTES", 1000)
    refused(package, "expected at most 1000 bytes in all")


def test_a_kernel_in_a_file_that_is_not_there(package: Path) -> None:
    rewrite(package, lambda root: root["kernels"][0].update(file="/lib/libc.so.6"))  # type: ignore[index]
    refused(package, "kernels[0].file: expected a file of the package")


@pytest.mark.parametrize("name", ["target", "dtype", "phase", "schedule", "table", "symbol"])
@pytest.mark.parametrize("text", ["cpu\n", "\ud800", "\x1b[2J"])
def test_a_kernel_for_something_that_cannot_be_shown(package: Path, name: str, text: str) -> None:
    rewrite(package, lambda root: root["kernels"][0].update({name: text}))  # type: ignore[index]
    refused(package, f"kernels[0].{name}: expected a printable name, got {text!r}")


def test_a_layer_without_a_kernel(package: Path) -> None:
    rewrite(package, lambda root: root["kernels"][0].update(layers=[0]))  # type: ignore[index]
    refused(package, "kernels for cpu fp32: expected each of 2 covered layers once")


@pytest.mark.parametrize("layers", [[], [0, 2], [-1, 0]])
def test_covered_layers_that_the_model_does_not_have(package: Path, layers: list[int]) -> None:
    rewrite(package, lambda root: root.update(layers=layers))
    refused(package, "layers: expected some of the layers 0..1")


def test_a_kernel_for_a_layer_that_is_not_covered(package: Path) -> None:
    rewrite(package, lambda root: root.update(layers=[1]))
    refused(package, "kernels for cpu fp32: expected each of 1 covered layers once")


@pytest.mark.parametrize("heads", [[0, 1], [1, 2], [1, 0], [0, 3], [-1, 2], [0, 0]])
def test_a_head_without_a_kernel(package: Path, heads: list[int]) -> None:
    rewrite(package, lambda root: root["kernels"][0].update(heads=heads))  # type: ignore[index]
    refused(package, "kernels for cpu fp32: layer 0: expected each of 2 heads once")


def test_heads_that_are_no_range(package: Path) -> None:
    rewrite(package, lambda root: root["kernels"][0].update(heads=[0, 1, 2]))  # type: ignore[index]
    refused(package, "kernels[0].heads: expected nothing, or a first and an end")


@pytest.mark.parametrize("name", ["topology.json", "schedule.safetensors"])
def test_a_required_file_that_is_not_listed(package: Path, name: str) -> None:
    manifest = manifest_of(package)
    kept = tuple(entry for entry in manifest.files if entry.path != name)
    (package / name).unlink()
    (package / "manifest.json").write_text(replace(manifest, files=kept).to_json())
    refused(package, f"files: expected {name}")


@pytest.fixture
def replaced(package: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Other packages take the place of `package`, each while a file of the one before is read; their ids."""
    read, ids = reader._read, []

    def read_while_another_comes(place: reader._Place, path: str, limit: int) -> bytes:
        if path == "topology.json" and len(ids) < REPLACED:
            packages.write(package, window_topology([1, 2, 3][: len(ids) % 3 + 1], head_dim=32))
            ids.append(hashlib.sha256((package / "manifest.json").read_bytes()).hexdigest())
        return read(place, path, limit)

    monkeypatch.setattr(reader, "_read", read_while_another_comes)
    return ids


REPLACED = 5


def test_a_package_that_is_replaced_while_it_is_read(package: Path, replaced: list[str]) -> None:
    found = read_package(package)
    assert found.id == replaced[-1]
    assert len(replaced) == REPLACED
    assert found.manifest == manifest_of(package)


def test_a_package_that_is_replaced_whenever_it_is_read(
    package: Path, replaced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_TRIES", REPLACED)
    refused(package, "expected a package that stays for as long as reading takes, got others each time; try later")


def test_a_package_that_is_removed_while_it_is_read(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reader._read

    def read_while_it_goes(place: reader._Place, path: str, limit: int) -> bytes:
        shutil.rmtree(package, ignore_errors=True)
        return read(place, path, limit)

    monkeypatch.setattr(reader, "_read", read_while_it_goes)
    refused(package, "expected a package folder, got nothing")


def test_no_folder_stays_open(package: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    read_package(package)
    (package / "cpu" / "unlisted").write_text("")
    refused(package, "expected only files that the manifest lists")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_cannot_be_shown_is_escaped() -> None:
    assert printable("a\nb \ud800 \x00 ≥") == "a\\nb \\ud800 \\x00 ≥"
