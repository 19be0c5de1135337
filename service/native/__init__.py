"""Compiled decoder layers for the CPU: one call instead of hundreds of small operations a step.

`src/` holds the C++: kernels that know no torch, and `decoder.cpp` that joins them with torch's own products.
`build.py` compiles them once and keeps the library, `parts.py` recognises a model whose layers they compute,
`decoder.py` runs it. Whatever they cannot do runs as the unmodified HF model instead. Imports nothing of ours
but errors.
"""
