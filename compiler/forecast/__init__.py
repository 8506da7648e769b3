"""Forecasts of the time and memory that long commands need, from the time of one dense prompt."""
