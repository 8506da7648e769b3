"""Schedules ─▶ specifications: the kernels that a target needs, with their tiles; dataclasses of later stages."""
