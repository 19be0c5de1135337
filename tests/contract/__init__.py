"""Contracts with real clients, unchanged: what they send is understood, what they get they understand.

Run by `make contract` in an environment of its own (`requirements.txt`), where a client that cannot be imported
fails its tests. The server is the real one over a tiny bundle whose chat template has tools (`family.py`).
"""
