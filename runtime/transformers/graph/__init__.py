"""Models as graphs: traced, with fused rotary embedding, or exported for serving."""
