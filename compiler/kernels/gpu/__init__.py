"""The GPU backend: Triton modules rendered, and compiled ahead of time without a GPU."""
