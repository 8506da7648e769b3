"""Measurements of the frozen model under patterns: the cost of each, with every finished step kept."""
