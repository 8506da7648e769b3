"""Patterns that heads may have while learning, windows and clusters, and topologies made of them."""
