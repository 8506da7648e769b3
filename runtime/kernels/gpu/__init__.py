"""A package's GPU kernels, loaded and launched through a driver."""
