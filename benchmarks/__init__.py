"""Measurements with their committed results; of it the tests run only short forms of `api/`.

`engine.py` measures the engine and holds it against others (`sections/`, `peers/`), `ways.py` what was tried to
make a decode step faster, `quality/` and `depth.py` how good answers are, `api/` what the HTTP server stands. Each
writes into `results/` itself.
"""
