"""An entry of a manifest ─▶ a kernel in a GPU's memory, after checks that the launcher can launch it."""

from dataclasses import replace

import torch

from surgeon.runtime.errors import PackageError, TargetError, short_repr
from surgeon.runtime.kernels.gpu.driver import Driver, Function
from surgeon.runtime.kernels.gpu.kernel import Kernel
from surgeon.runtime.package.interface import PAGED, PREFILL_PHASES, check_interface
from surgeon.runtime.package.manifest import KernelEntry, Manifest
from surgeon.runtime.package.reader import PackageFiles
from surgeon.runtime.package.target import Target

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of GPU kernels, by their names in the manifest."""

_AGAIN = "compile the package with this version of surgeon"
_MAX_THREADS = 1024
_MAX_SCRATCH_BYTES = 4096


def check_entry(entry: KernelEntry, manifest: Manifest, where: str) -> None:
    """Refuses a kernel that the launcher cannot launch: a wrong argument would be read as an address.

    Raises:
        PackageError: it breaks the launch contract.
    """
    check_interface(entry, where, manifest.routed)
    launch = entry.launch
    if launch is None or not (
        0 < launch.threads <= _MAX_THREADS
        and launch.tile_rows > 0
        and launch.shared_bytes >= 0
        and 0 <= launch.scratch_bytes <= _MAX_SCRATCH_BYTES
    ):
        raise PackageError(f"{where}.launch", "numbers of threads, rows and bytes in range", short_repr(launch), _AGAIN)
    if entry.dtype not in DTYPES:
        raise PackageError(f"{where}.dtype", f"one of {', '.join(DTYPES)}", short_repr(entry.dtype), _AGAIN)
    group = manifest.model.num_attention_heads // manifest.model.num_key_value_heads
    shares = launch.program_heads
    if shares != 1 and (shares < 1 or group % shares or entry.heads or entry.phase not in PREFILL_PHASES):
        expected = f"1, or in a prefill kernel of all heads a number that divides {group}"
        raise PackageError(f"{where}.launch.program_heads", expected, short_repr(shares), _AGAIN)
    if entry.heads and entry.phase not in PREFILL_PHASES:
        raise PackageError(f"{where}.heads", f"none for the phase {entry.phase}", short_repr(entry.heads), _AGAIN)
    name = _function_name(entry, not set(manifest.routed).isdisjoint(entry.layers))
    if entry.symbol != name or not entry.file.startswith(f"{Target.parse(entry.target).folder}/{name}.{entry.dtype}."):
        found = f"{entry.symbol} in {entry.file}"
        raise PackageError(f"{where}.symbol", f"{name}, in its file for {entry.dtype}", short_repr(found), _AGAIN)


def _function_name(entry: KernelEntry, routed: bool) -> str:
    """The name of the function that the compiler makes for an entry of the manifest, of layers that may be routed."""
    pages = PAGED if entry.phase.startswith(PAGED) else ""
    phase = entry.phase.removeprefix(PAGED)
    if phase == "decode" or entry.table.startswith("prefill"):
        name = "decode" if phase == "decode" else "attention_by_table"
        return f"routed_{name}" if routed else pages + name
    if phase != "prefill":
        return entry.phase
    return f"{pages}{entry.schedule}_head_{entry.heads[0]:02d}" if entry.heads else pages + entry.schedule


def load_kernel(
    entry: KernelEntry,
    files: PackageFiles,
    device: int,
    processors: int,
    driver: Driver,
    functions: dict[KernelEntry, Function],
) -> Kernel:
    """Loads a kernel into a device of this many `processors`; `functions` are those loaded, which entries may share.

    Raises:
        PackageError: the driver does not load it.
        TargetError: the device cannot hold it.
    """
    launch = entry.launch
    assert launch is not None
    code = replace(entry, layers=(), schedule="")
    if code not in functions:
        functions[code] = driver.load(
            files.files[entry.file],
            f"{files.folder}/{entry.file}",
            entry.symbol,
            [argument.type for argument in entry.arguments],
            device,
            launch.threads,
            launch.shared_bytes,
        )
    first, end = entry.heads or (0, files.manifest.model.num_attention_heads)
    names = tuple(argument.name for argument in entry.arguments)
    function = functions[code]
    at_once = max(1, processors * function.programs_a_processor()) if launch.persistent else None
    return Kernel(
        function,
        names,
        launch.grid,
        launch.tile_rows,
        launch.scratch_bytes,
        launch.program_heads,
        range(first, end),
        at_once,
    )


def paged_dtypes(manifest: Manifest, target: Target) -> tuple[torch.dtype, ...]:
    """The dtypes of a target's kernels for keys and values in pages; empty if it was compiled without them."""
    entries = [entry for entry in manifest.kernels if entry.target == str(target) and entry.phase.startswith(PAGED)]
    return tuple(dtype for name, dtype in DTYPES.items() if any(entry.dtype == name for entry in entries))


def no_pages(where: str, got: str) -> TargetError:
    """The error for a package without kernels for keys and values in pages."""
    remedy = "compile the package again with --paged (from Python, paged=True)"
    return TargetError(where, "kernels for keys and values in pages", got, remedy)
