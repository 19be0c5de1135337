"""Policy only: who joins a step, with how many tokens, in which KV blocks. Integers and clocks; no torch.

`scheduler.py` is the front door and reads top down: plan a step, then hear what came of it. Below it lie
`waiting.py` (who is next), `fairness.py` (whose turn), `experts.py` (whose experts are at hand) and
`blocks.py` → `pool.py`, `prefix.py` (KV memory). `catalogue.py` stands apart: names, generations, leases.
"""
