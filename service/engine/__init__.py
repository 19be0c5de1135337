"""One step: batch → forward → sample → events. KV cache, sampler, detokeniser. Start at `engine.py`."""
