"""Topologies: trees, heads, and topology.json, read and written."""
