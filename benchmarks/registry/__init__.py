"""What the registry stands: kills, replacement under load, two replicas, and how fast registrations are.

`python -m benchmarks.registry` runs all sections and writes `benchmarks/results/registry.json`. Start reading in
`__main__.py`. `processes.py` starts and kills real servers, `family.py` makes what they serve, `truth.py` says what
they must answer; each other module is one section.
"""
