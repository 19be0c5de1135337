"""Measurements of quality: merging, compression, routing."""
