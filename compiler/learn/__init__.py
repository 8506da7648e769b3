"""Learning a topology from a frozen model and some text: `surgeon learn`.

It needs torch and transformers, which compiling a topology does not: nothing outside this folder imports it at startup.
"""
