"""From sources to binaries: a C++ compiler for a CPU, Triton for GPUs, several at a time."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

from surgeon.compiler.build_cpu import build_cpu
from surgeon.compiler.cache import Cache
from surgeon.compiler.stages import Binary, Source


def build(
    sources: tuple[Source, ...], cache: Cache, jobs: int, progress: Callable[[str, int, int], None] | None
) -> tuple[Binary, ...]:
    """Compiles one target's sources, `jobs` at a time; `progress` is called as (what, done, total).

    Raises:
        TargetError: Triton is missing or cannot compile for the target.
        BuildError: a compiler is missing or fails.
    """
    if sources[0].target.backend == "cpu":
        return tuple(build_cpu(source, cache, jobs, progress) for source in sources)
    return _build_gpu(sources, jobs, progress)


def _build_gpu(
    sources: tuple[Source, ...], jobs: int, progress: Callable[[str, int, int], None] | None
) -> tuple[Binary, ...]:
    from surgeon.compiler.build_triton import build_triton  # Triton takes a second to import and is not everywhere

    work = [(source, dtype) for source in sources for dtype in source.specs[0].dtypes]
    report = progress or (lambda _what, _done, _total: None)
    what = f"compiling for {sources[0].target}"
    report(what, 0, len(work))
    binaries: dict[int, Binary] = {}
    # Triton's compiler holds the interpreter lock and keeps state in its process: one process a worker, started afresh.
    with ProcessPoolExecutor(min(jobs, len(work)), mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(build_triton, *item): index for index, item in enumerate(work)}
        try:
            for future in as_completed(pending):
                binaries[pending[future]] = future.result()
                report(what, len(binaries), len(work))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return tuple(binaries[index] for index in range(len(work)))
