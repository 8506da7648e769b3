"""Measurement of time, memory and quality."""
