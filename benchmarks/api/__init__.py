"""What the API stands: real clients, its own OpenAPI document thrown at it, thousands of connections, a long soak.

`python -m benchmarks.api` runs all four parts and writes `benchmarks/results/api.json`. Start reading in
`__main__.py`. `served.py` is the server under test, in a process of its own; `asking.py` the client.
"""
