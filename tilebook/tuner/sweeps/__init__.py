"""Whole spaces measured once and kept, and searches replayed over them without a GPU."""
