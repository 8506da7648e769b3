"""Kernel specifications ─▶ sources ─▶ binaries; a folder for each backend."""
