"""Logits → one token for every row. Imports torch, core, errors and grammar. Start at `sample.py`."""
