"""A pilot: several models measured side by side, and the file that holds the figures."""
