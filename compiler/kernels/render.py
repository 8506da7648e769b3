"""From kernel specifications to sources: one library for a CPU, one file a kernel for a GPU."""

from surgeon.compiler.kernels.cpu.render import render_cpu, variants_for
from surgeon.compiler.kernels.gpu.decode import render_decode
from surgeon.compiler.kernels.gpu.prefill import render_triton
from surgeon.compiler.specs.artifacts import KernelSpec, Source


def render(specs: tuple[KernelSpec, ...], machine: str) -> tuple[Source, ...]:
    """The sources of one target's kernels; `machine` is the build machine as `platform.machine()` names it."""
    if specs[0].target.backend == "cpu":
        return (render_cpu(specs, variants_for(machine)),)
    return (*render_triton(specs), *render_decode(specs))
