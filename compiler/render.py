"""From kernel specifications to sources: one library for a CPU, one file a kernel for a GPU."""

from surgeon.compiler.render_cpu import render_cpu, variants_for
from surgeon.compiler.render_decode import render_decode
from surgeon.compiler.render_triton import render_triton
from surgeon.compiler.stages import KernelSpec, Source


def render(specs: tuple[KernelSpec, ...], machine: str) -> tuple[Source, ...]:
    """The sources of one target's kernels; `machine` is the build machine as `platform.machine()` names it."""
    if specs[0].target.backend == "cpu":
        return (render_cpu(specs, variants_for(machine)),)
    return (*render_triton(specs), *render_decode(specs))
