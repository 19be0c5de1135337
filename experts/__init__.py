"""The domain: what an expert is, how experts are merged, compressed, routed and bundled.

Knows no HTTP and no scheduler and never imports `service`. Start reading at `bundle.py` (what is on
disk), then `checkpoint.py` (where weights come from), `merging/`, `compression/` and `routing/`.
"""
