"""One command that proves, tunes and times the kernels on the first GPU that is at hand."""
