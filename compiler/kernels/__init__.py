"""Kernel specifications ─▶ sources ─▶ binaries; one folder per backend."""
