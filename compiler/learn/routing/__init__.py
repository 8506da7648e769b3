"""Heads that choose blocks by content: which of a model's heads retrieve, and how their keys are quantised."""
