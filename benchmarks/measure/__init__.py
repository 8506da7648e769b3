"""How benchmarks measure: time, memory, quality."""
