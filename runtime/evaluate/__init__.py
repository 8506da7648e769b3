"""Comparison of a patched model with the dense one: quality, speed and memory, over several processes."""
