"""Serve time: verify and load a package, run its kernels, patch a model."""
