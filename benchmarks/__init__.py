"""Measurements with their committed results; none of it runs in the tests. Start at `first.py`."""
