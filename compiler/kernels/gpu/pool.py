"""Compiles a GPU target's sources in several processes, and caches the results."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

from surgeon.compiler.kernels.gpu.compile import OPTIONS, build_triton
from surgeon.compiler.specs.artifacts import Binary, GpuSource
from surgeon.compiler.system.cache import Cache
from surgeon.compiler.system.compilers import end_group, still_running, time_limit
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.system.versions import versions
from surgeon.runtime.errors import BuildError
from surgeon.runtime.package.manifest import KernelEntry

_WORKER = "worker-"  # and its number: the name of a file that says which processes to end


def build_gpu(
    sources: Sequence[GpuSource], cache: Cache, jobs: int, progress: Progress | None = None
) -> tuple[Binary, ...]:
    """Compiles one target's sources, `jobs` at a time; `progress` is called as (what, done, total).

    Raises:
        TargetError: Triton is missing or cannot compile for the target.
        BuildError: the compilation fails, takes longer than the time limit, or its process ends early.
    """
    # The compilers need no tables, which may be large.
    work = [(replace(source, tables={}), dtype) for source in sources for dtype in source.specs[0].dtypes]
    keys = [_key(source, dtype) for source, dtype in work]
    stored = {index: entry for index, key in enumerate(keys) if (entry := cache.get(key)) is not None}
    binaries = {index: Binary.from_bytes(entry) for index, entry in stored.items()}
    missing = [index for index in range(len(work)) if index not in binaries]
    report = progress or (lambda _what, _done, _total: None)
    what = f"compiling for {sources[0].target}"
    report(what, len(binaries), len(work))
    if missing:
        # Triton's compiler holds the interpreter lock and keeps state in its process: hence a fresh process per job.
        with _workers(min(jobs, len(missing)), what) as pool:
            with _no_main_module():
                pending = {pool.submit(build_triton, *work[index]): index for index in missing}
            for future in _completed(pending, what):
                index = pending[future]
                binaries[index] = future.result()
                cache.put(keys[index], binaries[index].to_bytes())
                report(what, len(binaries), len(work))
    return tuple(binaries[index] for index in range(len(work)))


@contextmanager
def _workers(number: int, what: str) -> Iterator[ProcessPoolExecutor]:
    """Starts processes whose temporary files lie in one folder; at a fault they end with all that they have started.

    Raises:
        BuildError: one of them ended early.
    """
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="surgeon-") as scratch,
        ProcessPoolExecutor(number, mp_context=context, initializer=_begin, initargs=(scratch,)) as pool,
    ):
        try:
            yield pool
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for file in Path(scratch).glob(f"{_WORKER}*"):
                end_group(int(file.name.removeprefix(_WORKER)))
            if isinstance(error, BrokenProcessPool):
                remedy = "see if memory ran out (dmesg tells) or the disk is full, and compile with fewer --jobs"
                wanted = "processes that compile to the end"
                raise BuildError(f"triton, {what}", wanted, "one that ended early", remedy) from error
            raise


def _begin(scratch: str) -> None:
    os.setpgid(0, 0)
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    Path(scratch, f"{_WORKER}{os.getpid()}").touch()


def _completed(pending: Iterable[Future[Binary]], what: str) -> Iterator[Future[Binary]]:
    """Yields what is done, in that order.

    Raises:
        BuildError: nothing more is done within the time limit of a compiler.
    """
    limit, left = time_limit(), set(pending)
    while left:
        done, left = wait(left, limit, FIRST_COMPLETED)
        if not done:
            raise still_running(f"triton, {what}", limit)
        yield from done


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Keeps processes started meanwhile from running the user's script again before their work.

    Spawned processes rerun whatever is `__main__`, and a script without a guard would compile in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _key(source: GpuSource, dtype: str) -> str:
    """The cache key of a GPU binary and its manifest entry: the compiler, our use of it, the kernel and its layers."""
    names = [(spec.name, spec.layers) for spec in source.specs]
    entry = [field.name for kind in (Binary, KernelEntry) for field in fields(kind)]  # of another version: useless
    use = repr((entry, source.interface, source.phase, source.table, source.tile, source.target, dtype, names))
    return Cache.key([*versions("triton"), OPTIONS, use, *(file.text for file in source.files)])
