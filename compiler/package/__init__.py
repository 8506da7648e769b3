"""Binaries ─▶ a package: writes, inspects and exports packages."""
