"""Patterns that heads may have during learning, windows and clusters, and the topologies made from them."""
