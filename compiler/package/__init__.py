"""Binaries ─▶ a package, written; and packages shown and exported."""
