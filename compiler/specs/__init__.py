"""Schedules ─▶ which kernels a target needs, with which tiles; the dataclasses of the later stages."""
