"""What benchmarks run on: models, texts, topologies."""
