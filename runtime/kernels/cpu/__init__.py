"""Loading and calling of a package's CPU library."""
