"""The Jinja templates that the compiler renders: `triton/*.py.jinja` for GPUs, `cpu/*.jinja` for CPUs."""
