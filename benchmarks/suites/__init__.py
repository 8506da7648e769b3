"""The suites that `make bench` runs."""
