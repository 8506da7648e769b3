"""Exports a kernel package in the layout of Hugging Face's `kernels`, which finds and imports it there.

build/ has one folder for each torch backend that the package has kernels for, each with the whole package, unchanged.
The module in it verifies and loads that package through `surgeon.runtime`, which must be installed.

Source: `kernels` 0.17, resolver.py, variants.py and importer.py: variants without an architecture, "torch-<backend>".
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.compiler.system import atomic_files
from surgeon.compiler.system.jinja import render_template
from surgeon.runtime.installation import DISTRIBUTION
from surgeon.runtime.package.reader import MANIFEST, PackageFiles, read_package
from surgeon.runtime.package.target import Target

NAME = "surgeon-attention"
"""The kernel's name."""

_PACKAGE = "package"
_BACKENDS = {"cpu": "cpu", "cuda": "cuda", "hip": "rocm"}


@dataclass(frozen=True)
class Build:
    """A folder in build/: the torch backend that it is for, and its architectures, empty for a CPU."""

    backend: str
    archs: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The folder's name."""
        return f"torch-{self.backend}"


def builds(targets: Sequence[str]) -> tuple[Build, ...]:
    """The builds for a package's targets, sorted by backend name."""
    archs: dict[str, list[str]] = {}
    for target in map(Target.parse, targets):
        found = archs.setdefault(_BACKENDS[target.backend], [])
        if target.backend != "cpu":
            found.append(_arch(target))
    return tuple(Build(backend, tuple(found)) for backend, found in sorted(archs.items()))


def export(package: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Writes a package to the folder `out` for `kernels.get_local_kernel(out)`; it appears whole or not at all.

    Raises:
        PackageError: the package is damaged, or something else exists at `out`.
    """
    out = Path(out)
    atomic_files.check_replaceable(out, "an export for Hugging Face's kernels", _is_export)
    files = read_package(package)
    packaged = {f"{_PACKAGE}/{path}": data for path, data in files.files.items()}
    packaged[f"{_PACKAGE}/{MANIFEST}"] = files.manifest_bytes
    chosen = builds(files.manifest.targets)
    written = {"README.md": _readme(files, chosen)}
    for build in chosen:
        contents = {"__init__.py": _module(files)} | packaged
        contents["metadata.json"] = _metadata(build, files.id, contents)
        written |= {f"build/{build.folder}/{path}": data for path, data in contents.items()}
    atomic_files.write(out, written)
    return out


def _arch(target: Target) -> str:
    """An architecture as `kernels` writes it: "a" marks code from compute capability 9.0 on, which runs on no other."""
    if target.backend == "hip":
        return target.arch
    capability = f"{target.arch[:-1]}.{target.arch[-1]}"
    return capability if target.arch.startswith("8") else f"{capability}a"


def _is_export(folder: Path) -> bool:
    """True if a folder holds nothing but an export: a repository with its own history is not replaced."""
    build = folder / "build"
    names = {entry.name for entry in folder.iterdir()}
    return (
        names <= {"build", "README.md"}
        and build.is_dir()
        and all((build / _PACKAGE / MANIFEST).is_file() for build in build.iterdir())
    )


def _module(files: PackageFiles) -> bytes:
    return render_template("hf_kernels/module.py.jinja", package=_PACKAGE, **_description(files)).encode()


def _readme(files: PackageFiles, chosen: Sequence[Build]) -> bytes:
    return render_template(
        "hf_kernels/README.md.jinja", name=NAME, builds=chosen, id=files.id, **_description(files)
    ).encode()


def _description(files: PackageFiles) -> Mapping[str, object]:
    manifest = files.manifest
    return {
        "distribution": DISTRIBUTION,
        "model": manifest.model,
        "block_size": manifest.block_size,
        "num_blocks": manifest.num_blocks,
    }


def _metadata(build: Build, package_id: str, contents: Mapping[str, bytes]) -> bytes:
    """Makes metadata.json: `id` is the module's name in Python, and the digest covers every other file."""
    digests = {path: base64.b64encode(hashlib.sha256(data).digest()).decode() for path, data in contents.items()}
    metadata = {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{build.backend}_{package_id[:12]}",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": build.backend} | ({"archs": build.archs} if build.archs else {}),
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return (json.dumps(metadata, indent=1, sort_keys=True) + "\n").encode()
