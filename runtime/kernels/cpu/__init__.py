"""The CPU library of a package, loaded and called."""
