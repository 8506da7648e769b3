"""Compiles a GPU target's sources in several processes, and caches the results."""

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import fields, replace
from types import ModuleType

from surgeon.compiler.kernels.gpu.compile import build_triton
from surgeon.compiler.specs.artifacts import Binary, GpuSource
from surgeon.compiler.system.cache import Cache
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.system.versions import versions
from surgeon.runtime.package.manifest import KernelEntry


def build_gpu(
    sources: Sequence[GpuSource], cache: Cache, jobs: int, progress: Progress | None = None
) -> tuple[Binary, ...]:
    """Compiles one target's sources, `jobs` at a time; `progress` is called as (what, done, total).

    Raises:
        TargetError: Triton is missing or cannot compile for the target.
        BuildError: the compilation fails.
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
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=context) as pool:
            with _no_main_module():
                pending = {pool.submit(build_triton, *work[index]): index for index in missing}
            try:
                for future in as_completed(pending):
                    index = pending[future]
                    binaries[index] = future.result()
                    cache.put(keys[index], binaries[index].to_bytes())
                    report(what, len(binaries), len(work))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return tuple(binaries[index] for index in range(len(work)))


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
    entry = [field.name for field in fields(KernelEntry)]  # an entry of another version is useless
    use = repr((entry, source.interface, source.phase, source.table, source.tile, source.target, dtype, names))
    return Cache.key([*versions("triton"), use, *(file.text for file in source.files)])
