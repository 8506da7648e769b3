"""The GPU backend: Triton modules, rendered, then compiled ahead of time without a GPU."""
