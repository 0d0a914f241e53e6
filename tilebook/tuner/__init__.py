"""Finds the fastest correct way to run a problem on a GPU.

`run` puts a run together, `shards` deals its problems out to GPUs, `session` tunes one: `known`, `explore`, `decide`.
Rooms: `process` (what can be killed), `judge` (what is measured), `sweeps` (what is recorded and replayed).
"""
