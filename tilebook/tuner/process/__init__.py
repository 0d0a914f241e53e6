"""Processes that may die: those that compile for any GPU, and those that verify and time on one."""
