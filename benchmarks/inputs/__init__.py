"""The inputs of benchmarks: models, texts, topologies."""
