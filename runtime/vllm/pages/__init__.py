"""The pages of vLLM's cache: what they hold, which are still needed, and which requests share them."""
