"""Logits → one token for every row. Imports torch, core and nothing else of ours. Start at `sample.py`."""
