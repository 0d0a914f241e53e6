"""Verdicts looked at again on the GPU that is here: those that nobody here vouches for, and those that became stale.

`subjects` says at which and in what order, `check` looks at one, `run` goes through them and stores what came of it.
"""
