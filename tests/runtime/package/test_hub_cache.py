"""Packages in the cache of the Hub: links say what to do, and are followed only into the repository's own blobs."""

import shutil
from pathlib import Path

import pytest

import packages
from hub_cache import cached
from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.reader import read_package
from topologies import window_topology


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return packages.write(tmp_path / "kernels", window_topology([1, 2], num_layers=2, num_blocks=4))


@pytest.fixture
def snapshot(package: Path, tmp_path: Path) -> Path:
    return cached(package, tmp_path / "hub" / "models--me--kernels")


def refused(folder: Path, *words: str, hub_cache: bool = True) -> None:
    with pytest.raises(PackageError) as caught:
        read_package(folder, hub_cache)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_link_says_what_to_do(snapshot: Path, tmp_path: Path) -> None:
    words = "got a symbolic link into the Hub's cache; copy the package (cp -rL), or download it with local_dir=..."
    refused(snapshot, f"{snapshot}/manifest.json", words, hub_cache=False)
    assert read_package(shutil.copytree(snapshot, tmp_path / "copy")).id, "what cp -rL makes is a package"


def test_the_blobs_are_read_where_that_is_asked_for(snapshot: Path, package: Path, tmp_path: Path) -> None:
    found, whole = read_package(snapshot, hub_cache=True), read_package(package)
    assert found.id == whole.id
    assert found.files == whole.files
    (tmp_path / "short").symlink_to(snapshot)  # what a user puts in its place is the user's
    assert read_package(tmp_path / "short", hub_cache=True).id == whole.id


def test_a_package_outside_such_a_cache_is_read_as_ever(package: Path, tmp_path: Path) -> None:
    assert read_package(package, hub_cache=True).id == read_package(package).id
    (package / "topology.json").rename(tmp_path / "moved")
    (package / "topology.json").symlink_to(tmp_path / "moved")
    refused(package, "topology.json: expected a file or folder, got a symbolic link; do not use this package")


def test_a_link_that_leaves_the_blobs_is_not_followed(snapshot: Path, tmp_path: Path) -> None:
    """To another repository, through a link in the blobs, and to a folder above: the bytes are right in all cases."""
    file = snapshot / "topology.json"
    blob = file.resolve()
    other = tmp_path / "hub" / "models--you--kernels" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(blob, other / blob.name)
    (blob.parent / "aside").symlink_to(other)
    (blob.parent / "link").symlink_to(other / blob.name)
    for target in (other / blob.name, blob.parent / "aside" / blob.name, blob.parent / "link", Path("../../blobs/..")):
        file.unlink()
        file.symlink_to(target)
        refused(snapshot, "topology.json: expected a ")


def test_a_folder_of_blobs_that_is_a_link_is_none(snapshot: Path, tmp_path: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(tmp_path / "blobs")
    refused(snapshot, "manifest.json: expected a file or folder, got a symbolic link; do not use this package")


def test_the_hash_of_a_blob_is_checked(snapshot: Path) -> None:
    blob = (snapshot / "topology.json").resolve()
    blob.write_bytes(blob.read_bytes()[::-1])
    refused(snapshot, "topology.json: expected SHA-256")


def test_a_blob_that_is_gone(snapshot: Path) -> None:
    (snapshot / "topology.json").resolve().unlink()
    refused(snapshot, "topology.json: expected a readable file, got No such file or directory")
