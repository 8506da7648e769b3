"""The torch ops, their input checks and the registry of loaded packages."""
