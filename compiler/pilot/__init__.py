"""A package compared with the dense model, as a table and as a page."""
