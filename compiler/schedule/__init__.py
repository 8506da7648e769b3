"""Topology ─▶ which blocks every row reads; analyses of it; tables of segments."""
