"""The blocks of a cache that some later row reads, and a pool that holds only those."""
