"""Scoring and tables: how good is a merge, an expert, a router."""
