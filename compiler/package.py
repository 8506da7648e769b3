"""Writes a kernel package: everything that was made, listed in a manifest, put in place in one step.

Source: package format version 1; its reader is `surgeon.runtime.package`.
"""

import ctypes
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from surgeon.compiler.decode_table import decode_table
from surgeon.compiler.schedule import HeadSchedule
from surgeon.compiler.stages import Binary, KernelSpec, Source
from surgeon.compiler.topology import Topology
from surgeon.runtime.errors import PackageError
from surgeon.runtime.manifest import FileEntry, Manifest

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_replaceable(out: Path) -> None:
    """Refuses to put a package where something else stands, or where the process itself does.

    Raises:
        PackageError: `out` exists and is neither a kernel package nor an empty folder, or holds the current folder.
    """
    here = Path.cwd()
    if out.resolve() in (here, *here.parents):  # the swap would take it away from under this process and its shell
        raise PackageError(str(out), "a folder of its own", "the current folder or one above it", "name another --out")
    if not (out.is_symlink() or out.exists()):
        return
    ours = out.is_dir() and ((out / "manifest.json").is_file() or not any(out.iterdir()))
    if out.is_symlink() or not ours:
        raise PackageError(
            str(out), "a kernel package, an empty folder or nothing", "something else", "name another --out"
        )


def write_package(out: Path, topology: Topology, sources: Sequence[Source], binaries: Sequence[Binary]) -> Path:
    """Writes the package to a folder beside `out` and renames it into place; what stood there before goes only then.

    Raises:
        PackageError: `out` exists and is not a kernel package.
    """
    check_replaceable(out)
    specs = {spec.name: spec for source in sources for spec in source.specs}
    files = {
        "topology.json": (topology.canonical() + "\n").encode(),
        "schedule.safetensors": _schedule_tables(list(specs.values())),
    }
    decoded = {spec.name: spec for source in sources if source.phase == "decode" for spec in source.specs}
    if decoded:
        files["decode.safetensors"] = _decode_tables(list(decoded.values()))
    files |= {file.path: file.text.encode() for source in sources for file in source.files}
    files |= {binary.path: binary.data for binary in binaries}
    manifest = Manifest(
        topology_sha256=topology.sha256,
        model=topology.model,
        block_size=topology.block_size,
        num_blocks=topology.num_blocks,
        beyond=topology.beyond,
        layers=topology.covered,
        kernels=tuple(kernel for binary in binaries for kernel in binary.kernels),
        files=tuple(
            FileEntry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())
        ),
        tools=tuple(sorted({tool for binary in binaries for tool in binary.tools}, key=lambda tool: tool.name)),
    )
    files["manifest.json"] = manifest.to_json().encode()

    place = out.resolve()  # a name for the folder beside it, also where `out` ends in ".."
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=place.parent))
    try:
        temporary.chmod(0o755)
        for path, data in files.items():
            _write_durably(temporary / path, data)
        _put_in_place(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _schedule_tables(specs: Sequence[KernelSpec]) -> bytes:
    """Every kernel's schedule as int32 tensors.

    For a kernel named n: `n.pieces` [pieces, 6] in the order of `Piece`, `n.runs` [runs, 2], and `n.heads`
    [heads, 3]: first piece, end piece, first run. A piece's run numbers count from its head's first run.
    """
    tensors = {}
    for spec in specs:
        places: dict[HeadSchedule, tuple[int, int, int]] = {}
        pieces: list[tuple[int, ...]] = []
        runs: list[tuple[int, int]] = []
        for head in spec.schedule.heads:
            if head not in places:
                places[head] = (len(pieces), len(pieces) + len(head.pieces), len(runs))
                pieces += head.pieces
                runs += head.runs
        tensors[f"{spec.name}.pieces"] = np.array(pieces, dtype=np.int32).reshape(-1, 6)
        tensors[f"{spec.name}.runs"] = np.array(runs, dtype=np.int32).reshape(-1, 2)
        tensors[f"{spec.name}.heads"] = np.array([places[head] for head in spec.schedule.heads], dtype=np.int32)
    return safetensors.numpy.save(tensors)


def _decode_tables(specs: Sequence[KernelSpec]) -> bytes:
    """What a GPU's decoding kernels read of every schedule: `n.rows`, `n.plans` and `n.segments`; see `DecodeTable`."""
    tensors: dict[str, npt.NDArray[np.int32]] = {}
    for spec in specs:
        table = decode_table(spec.schedule)
        tensors |= {
            f"{spec.name}.rows": table.rows,
            f"{spec.name}.plans": table.plans,
            f"{spec.name}.segments": table.segments,
        }
    return safetensors.numpy.save(tensors)


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(temporary: Path, out: Path) -> None:
    """Swaps the two folders, so that at every moment one whole package stands under the name."""
    if not out.exists():
        temporary.rename(out)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    exchange = getattr(libc, "renameat2", None)
    if exchange is not None:
        names = os.fsencode(temporary), os.fsencode(out)
        if exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    # A file system without exchange: between these two renames the name is free for an instant, and the old package
    # stands beside it.
    aside = temporary.with_suffix(".old")
    out.rename(aside)
    temporary.rename(out)
    shutil.rmtree(aside, ignore_errors=True)
