"""The Jinja templates that the compiler renders: `triton/` for GPUs, `cpu/` for CPUs, `hf_kernels/` for an export."""
