"""Measurements with their committed results; none of it runs in the tests.

`engine.py` measures the engine and holds it against others (`sections/`, `peers/`), `ways.py` what was tried to
make a decode step faster, `quality/` and `depth.py` how good answers are. Each writes into `results/` itself.
"""
