"""Trees, heads and topology.json, read and written."""
