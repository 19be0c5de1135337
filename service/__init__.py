"""The server: HTTP in front, an engine thread behind. May import `experts`, never the reverse.

Import order, one way: cli → api → runtime → {scheduler | engine} → gating → core, errors. Start reading
at `core.py` (the words), then `runtime.py` (how a request lives), then `engine/`.
"""
