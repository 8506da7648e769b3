"""A package tried beside the dense model, as a table and as a page."""
