"""Build time: from a topology to a package of compiled kernels."""
