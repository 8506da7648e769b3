"""The package's format, which compiler and runtime share. It imports no torch."""
