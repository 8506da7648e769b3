"""The frozen model run under patterns: what each would cost, step by step, in a journal."""
