"""The budget of blocks, shared by measured costs."""
