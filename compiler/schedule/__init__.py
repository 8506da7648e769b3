"""Topology ─▶ schedules, the blocks that every row reads; their analyses; segment tables."""
