"""All that knows Hugging Face's Transformers: patch, masks, caches, fingerprints."""
