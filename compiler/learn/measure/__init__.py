"""The frozen model run under patterns: what each would cost, each step kept once done."""
