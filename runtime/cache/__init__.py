"""Which blocks of a cache some later row reads, and pages that hold these alone."""
