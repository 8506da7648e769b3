"""A patched model measured beside the dense one: quality, speed, memory, over several processes."""
