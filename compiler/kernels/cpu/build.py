"""Builds the rendered C++ into one shared object: compiles each source file that changed, then links."""

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from surgeon.compiler.kernels.cpu.check import check_library
from surgeon.compiler.specs.artifacts import Binary, CpuSource
from surgeon.compiler.system.atomic_files import naming
from surgeon.compiler.system.cache import Cache
from surgeon.compiler.system.compilers import Compilers
from surgeon.compiler.system.terminal import Progress
from surgeon.runtime.errors import BuildError
from surgeon.runtime.package.manifest import Argument, KernelEntry, Tool

LIBRARY = "cpu/attention.so"
DIRECT = "cpu/direct.cpp"
"""The source of a library of its own; see `surgeon.compiler.kernels.cpu.direct`."""
# No -ffast-math, which silently breaks exp2. No paths, dates or build ids: equal sources give equal bytes.
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
)
LINK_FLAGS = ("-shared", "-s", "-Wl,--as-needed", "-Wl,--build-id=none")
_LIBRARIES = ("-lgomp",)  # whatever the compiler: see templates/cpu/driver.cpp.jinja


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that runs it and the first line of its version."""

    command: str
    version: str


def build_cpu(source: CpuSource, cache: Cache, jobs: int, progress: Progress | None = None) -> Binary:
    """Compiles and links the library of a CPU target.

    `jobs` is the number of compilers that run at once; `progress` is called as (what, done, total).

    Raises:
        BuildError: no C++ compiler is found, it fails or takes longer than the time limit, or makes no such library.
    """
    compiler = find_compiler(os.environ.get("CXX"))
    report = progress or (lambda _what, _done, _total: None)
    headers = headers_of(source)
    units = {
        PurePosixPath(file.path).name: file.text
        for file in source.files
        if file.path.endswith(".cpp") and file.path != DIRECT
    }
    flags = {PurePosixPath(path).name: more for path, more in source.flags.items()}

    def compile_unit(name: str) -> bytes:
        arguments = (*COMPILE_FLAGS, *flags.get(name, ()))
        key = cache.key((compiler.version, *arguments, name, units[name], *headers, *headers.values()))
        found = cache.get(key)
        return found or _store(
            cache, key, run_compiler(compilers, compiler, arguments, headers | {name: units[name]}, [name])
        )

    objects: dict[str, bytes] = {}
    report("compiling for cpu", 0, len(units) + 1)
    with ThreadPoolExecutor(jobs) as pool, Compilers() as compilers:
        pending = {pool.submit(compile_unit, name): name for name in units}
        try:
            for future in as_completed(pending):
                objects[pending[future]] = future.result()
                report("compiling for cpu", len(objects), len(units) + 1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        ordered = {f"{name}.o": objects[name] for name in sorted(objects)}
        key = cache.key((compiler.version, *LINK_FLAGS, *_LIBRARIES, *ordered.values()))
        library = cache.get(key)
        if library is None:
            library = run_compiler(compilers, compiler, LINK_FLAGS, ordered, [*ordered, *_LIBRARIES])
            check_library(compilers, library, compiler.version, source.specs)
            cache.put(key, library)
    report("compiling for cpu", len(units) + 1, len(units) + 1)
    return Binary(
        path=LIBRARY,
        data=library,
        kernels=tuple(
            KernelEntry(
                target=str(spec.target),
                dtype=dtype,
                layers=spec.layers,
                schedule=spec.name,
                file=LIBRARY,
                symbol=spec.symbol,
                arguments=(Argument("call", "struct"),),
                launch=None,
                preconditions=(),
            )
            for spec in source.specs
            for dtype in spec.dtypes
        ),
        tools=(Tool(Path(compiler.command).name, compiler.version),),
    )


def headers_of(source: CpuSource) -> dict[str, str]:
    """The texts of a source's headers, by name."""
    return {PurePosixPath(file.path).name: file.text for file in source.files if file.path.endswith(".h")}


@cache
def find_compiler(wanted: str | None) -> Compiler:
    """Returns the C++ compiler to use: `wanted`, or the first of g++, clang++ and c++ on PATH.

    Raises:
        BuildError: there is none, or it does not answer.
    """
    for candidate in (wanted,) if wanted else ("g++", "clang++", "c++"):
        command = shutil.which(candidate)
        if command is None:
            continue
        command = str(Path(command).absolute())  # it runs in other folders
        with Compilers() as compilers:
            result = compilers.run([command, "--version"], Path.cwd(), command, {})
        if result.returncode == 0 and result.stdout:
            return Compiler(command, result.stdout.splitlines()[0])
    raise BuildError(
        "target cpu",
        f"the C++ compiler {wanted} (from $CXX)" if wanted else "a C++ compiler (g++ or clang++) on PATH",
        "none",
        "install one, for example Debian's g++, or set CXX",
    )


def _store(cache: Cache, key: str, data: bytes) -> bytes:
    cache.put(key, data)
    return data


def run_compiler(
    compilers: Compilers,
    compiler: Compiler,
    flags: tuple[str, ...],
    files: dict[str, bytes] | dict[str, str],
    inputs: list[str],
) -> bytes:
    """Runs the compiler in a folder of its own, with relative names, and returns the file it made.

    Raises:
        BuildError: it fails or takes longer than the time limit.
    """
    where = f"{compiler.version}: {inputs[0]}"
    with tempfile.TemporaryDirectory(prefix="surgeon-") as folder:
        for name, content in files.items():
            with naming(Path(folder) / name):
                (Path(folder) / name).write_bytes(content.encode() if isinstance(content, str) else content)
        mode = () if "-shared" in flags else ("-c",)
        command = [compiler.command, *flags, *mode, *inputs, "-o", "out"]
        result = compilers.run(command, Path(folder), where, {"LC_ALL": "C"})
        if result.returncode != 0:
            lines = result.stderr.splitlines()
            fault = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
            raise BuildError(
                where,
                "the rendered source to compile",
                f"exit status {result.returncode}: {fault[:300]}",
                "write the sources with --dump and compile them by hand to see all messages",
            )
        return (Path(folder) / "out").read_bytes()
