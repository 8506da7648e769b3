"""Loading and launching of a package's GPU kernels through a driver."""
