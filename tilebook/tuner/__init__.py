"""The tuner: compiles, verifies, measures and searches; `session.tune` is its entry."""
