"""A model as a graph: traced, with fused rotary embedding, or exported for serving."""
