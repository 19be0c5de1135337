"""The sections of the suite: each measures one or two rows of the engine's table, in a process of its own.

A section is a function from a `Context` to figures. `benchmarks/engine.py` lists them; start there.
"""
