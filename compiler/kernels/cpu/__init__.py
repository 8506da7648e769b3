"""The CPU backend: C++ rendered, compiled and linked into one library."""
