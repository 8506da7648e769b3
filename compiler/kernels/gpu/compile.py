"""Source ─▶ Binary for GPU targets: Triton compiled ahead of time, on a machine that needs no GPU."""

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from surgeon.compiler.kernels.gpu.abi import check_abi
from surgeon.compiler.specs.artifacts import Binary, GpuSource
from surgeon.compiler.specs.tiles import Device, Tile
from surgeon.compiler.system.atomic_files import naming
from surgeon.compiler.system.signals import signals_kept
from surgeon.compiler.system.versions import TRITON
from surgeon.runtime.errors import BuildError, TargetError
from surgeon.runtime.installation import required
from surgeon.runtime.package.interface import ALIGNMENT, POINTEES, PREFILL_PHASES
from surgeon.runtime.package.manifest import Argument, KernelEntry, Launch, Tool
from surgeon.runtime.package.target import Target

OPTIONS = "fp fusion on, off where bits must not differ, Hopper's code for drivers from CUDA 12 on"
"""The use of Triton beyond a kernel's tile, which belongs to the cache key of a binary."""

_EXTENSIONS = {"cuda": "cubin", "hip": "hsaco"}
_ASSEMBLIES = {"cuda": "ptx", "hip": "amdgcn"}
_SCRATCH_ALIGNMENT = 128
_FOR_OLDER_DRIVERS = (Target("cuda", "90"),)
"""Targets for which Triton 3.9 takes the newer of its two assemblers, whose code only CUDA 13 drivers load."""


def check_triton(target: Target) -> None:
    """Imports Triton, which is only needed to compile for a GPU.

    Raises:
        TargetError: Triton is missing, or is of a version that is not tested.
    """
    required("triton", TargetError, f"target {target}", "leave the target out")
    import triton

    if triton.__version__ not in TRITON:
        raise TargetError(
            f"target {target}",
            f"Triton {TRITON}, which are tested",
            triton.__version__,
            f"run pip install 'triton{TRITON.requirement}', or leave the target out",
        )


def build_triton(source: GpuSource, dtype: str) -> Binary:
    """Compiles one rendered kernel for one dtype; the file is `<target>/<name>.<dtype>.cubin`, or `.hsaco` for hip.

    Nothing about the machine gets into the file: equal sources make equal bytes with one version of Triton.

    Raises:
        TargetError: Triton is missing, is not tested or has no code generator for the target, or the kernel needs more
            shared memory than the target has.
        BuildError: the compilation failed, or made a kernel that the launcher could not call.
    """
    interface = source.interface
    device = source.specs[0].device
    extension = _EXTENSIONS[source.target.backend]
    compiled, version = _compile(source, source.tile, dtype, device)
    metadata = compiled.metadata
    symbol = _symbol(source)
    if metadata.shared > device.shared_bytes:
        raise TargetError(
            f"{symbol} for {source.target}",
            f"at most {device.shared_bytes} bytes of shared memory",
            f"{metadata.shared} bytes",
            "no tile for this head size fits the target; leave the target out",
        )
    scratch_bytes = getattr(metadata, "global_scratch_size", 0)  # for HIP, Triton knows it since 3.8
    if scratch_bytes and (source.tile.loads == "pointers" or _SCRATCH_ALIGNMENT % metadata.global_scratch_align):
        raise BuildError(
            f"{symbol} for {source.target}",
            "a kernel without scratch memory, or with some for its descriptors",
            f"{scratch_bytes} bytes aligned to {metadata.global_scratch_align}, with loads by {source.tile.loads}",
            "report it with the topology and Triton's version",
        )
    threads = metadata.num_warps * device.warp_size
    assembly = compiled.asm[_ASSEMBLIES[source.target.backend]]
    check_abi(assembly, interface.binary_arguments, threads, f"{symbol} for {source.target}")
    path = f"{source.target.folder}/{symbol}.{dtype}.{extension}"
    entry = KernelEntry(
        target=str(source.target),
        dtype=dtype,
        layers=tuple(sorted(layer for spec in source.specs for layer in spec.layers)),
        schedule="",
        file=path,
        symbol=metadata.name,
        arguments=interface.binary_arguments,
        launch=Launch(
            grid=interface.grid,
            tile_rows=source.tile.queries,
            threads=threads,
            shared_bytes=metadata.shared,
            scratch_bytes=scratch_bytes,
            program_heads=source.tile.heads,
        ),
        preconditions=interface.preconditions,
        phase=source.phase,
        heads=source.heads,
        table=source.table,
    )
    entries: tuple[KernelEntry, ...] = (entry,)
    if source.phase in PREFILL_PHASES:  # one per schedule that shares the code
        entries = tuple(replace(entry, layers=spec.layers, schedule=spec.name) for spec in source.specs)
    return Binary(
        path,
        compiled.asm[extension],
        entries,
        (Tool("triton", f"{version}, fp fusion {'on' if source.fuses else 'off'}"),),
        assembly,
    )


def _symbol(source: GpuSource) -> str:
    (file,) = source.files
    return Path(file.path).stem


def _compile(source: GpuSource, tile: Tile, dtype: str, device: Device) -> tuple[Any, str]:
    """Returns Triton's CompiledKernel and Triton's version."""
    check_triton(source.target)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:  # Triton reads it on import, so it cannot be undone here
        raise BuildError("TRITON_INTERPRET", "unset while kernels are compiled", "1", "unset it")
    interface = source.interface
    arch = int(source.target.arch) if source.target.backend == "cuda" else source.target.arch
    signature = {argument.name: _triton_type(argument, dtype) for argument in interface.arguments}
    divisible = [index for index, name in enumerate(signature) if name in interface.aligned]
    with tempfile.TemporaryDirectory() as folder, _reproducible(triton.knobs, folder, source.target):
        try:
            kernel = getattr(_load(source, Path(folder)), _symbol(source))
            compiled = triton.compile(
                ASTSource(kernel, signature, attrs={(index,): [["tt.divisibility", ALIGNMENT]] for index in divisible}),
                target=GPUTarget(source.target.backend, arch, device.warp_size),
                options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": source.fuses},
            )
        except (
            Exception
        ) as error:  # Triton, the LLVM binding and ptxas each raise their own types, even bare RuntimeError
            raise BuildError(
                f"{_symbol(source)} for {source.target}, {dtype}",
                "a kernel that Triton compiles",
                _innermost(error),
                "report it with the topology and Triton's version",
            ) from error
    return compiled, triton.__version__


def _innermost(error: BaseException) -> str:
    """One line that says what went wrong: Triton wraps the cause once for every function that a kernel calls."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


@contextlib.contextmanager
def _reproducible(knobs: Any, cache: str, target: Target) -> Iterator[None]:
    """Isolates Triton from the environment and from earlier runs, and silences it: errors go to BuildError."""
    with (
        knobs.cache.scope(),
        knobs.compilation.scope(),
        knobs.language.scope(),
        knobs.nvidia.scope(),
        knobs.runtime.scope(),
        signals_kept(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        knobs.cache.dir = cache
        knobs.compilation.disable_line_info = True  # keeps the source's path out of the binary
        knobs.language.force_disable_fp_fusion = False
        knobs.runtime.override_arch = None
        if target in _FOR_OLDER_DRIVERS:
            knobs.nvidia.ptxas_blackwell = knobs.nvidia.ptxas.path
        yield


def _load(source: GpuSource, folder: Path) -> ModuleType:
    """Imports the rendered module from a file, since Triton reads a kernel's text back from its file."""
    (file,) = source.files
    path = folder / Path(file.path).name
    with naming(path):
        path.write_text(file.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _triton_type(argument: Argument, dtype: str) -> str:
    return "*" + POINTEES.get(argument.name, dtype) if argument.type == "pointer" else argument.type
