"""The budget of blocks, shared among heads by measured costs."""
