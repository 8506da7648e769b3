"""Retrieval tasks in the sense of RULER: facts hidden in filler text and asked for, at the prompt's end or later."""
