"""Everything specific to Hugging Face's Transformers: patching, masks, caches, fingerprints, graphs."""
